"""Rendering: what the LLM reads of an example, the answer behind it, and what the generator reads."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conftest import byte_level_tokenizer, make_atv, make_llm, sentencepiece_tokenizer, toy_task
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from rendering import Letters, encode_pair, prompt_text

from atv.config import TrainConfig
from atv.data import Example, Prompt, Template
from atv.data.folder import load_task
from atv.data.render import Renderer, answer_ids, plain_prompt
from atv.evaluation.records import RunWriter
from atv.evaluation.run import evaluate
from atv.lm.scoring import training_options
from atv.methods.atv import ATVMethod
from atv.methods.icl import ICL
from atv.model import ATVModel
from atv.training.batches import training_rows
from atv.training.loop import train


def tokens(render: Renderer, tokenizer: Any, query: str, answer: str) -> tuple[list[int], list[int]]:
    """Prompt and answer."""
    prompt = render.prompt(tokenizer, Example(query, ""))
    return prompt.ids, render.answer(tokenizer, prompt, answer)


# ---- the seam between prompt and answer ----


TOKENIZERS = {"byte-level": byte_level_tokenizer(), "sentencepiece": sentencepiece_tokenizer()}
ANSWERS = ["positive", "negative", "yes", "no", "A", "True", "the answer is two"]
WORDS = st.text(alphabet="abcdeilnopqrstuvy ,.?", min_size=1, max_size=30).filter(str.strip)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(
    prompt=WORDS,
    prefix=st.sampled_from([None, "A:", "The answer is"]),
    answer=st.sampled_from(["positive", "negative", "yes", "no", "A", "True", "the answer is two"]),
)
def test_prompt_and_answer_are_the_tokens_of_the_whole_text(kind, prompt, prefix, answer):
    tokenizer = TOKENIZERS[kind]
    render = Template("{input}", prefix)
    read = render.prompt(tokenizer, Example(prompt.strip(), ""))
    text = prompt.strip() if prefix is None else f"{prompt.strip()}\n{prefix}"
    assert read.ids == tokenizer(text)["input_ids"]
    assert (read.ids, render.answer(tokenizer, read, answer)) == encode_pair(tokenizer, text, answer)


def test_a_sentencepiece_answer_has_one_space_where_encoding_it_alone_would_give_two():
    tokenizer = TOKENIZERS["sentencepiece"]
    _, answer = tokens(Template("{input}", "A:"), tokenizer, "is it?", "positive")
    together = tokenizer("is it?\nA: positive")["input_ids"]
    assert [*together, tokenizer.eos_token_id][-len(answer) :] == answer
    assert tokenizer.convert_ids_to_tokens(answer)[0].count("▁") == 1


class MergingTokenizer:
    """Greedy longest match over a vocabulary in which one token reaches over the seam between prompt and answer."""

    vocabulary = ("X y", "X", " y", " ", "y", "a", ":", "\n")
    eos_token_id = None

    def __call__(self, text):
        ids = []
        while text:
            token = next(token for token in self.vocabulary if text.startswith(token))
            ids.append(self.vocabulary.index(token))
            text = text[len(token) :]
        return {"input_ids": ids}


def test_a_token_that_reaches_over_the_seam_is_not_cut():
    tokenizer = MergingTokenizer()
    assert tokenizer("X y")["input_ids"] == [0]  # the whole text is one token
    prompt, answer = tokens(Template("{input}"), tokenizer, "X", "y")
    assert [tokenizer.vocabulary[i] for i in prompt] == ["X"]
    assert [tokenizer.vocabulary[i] for i in answer] == [" y"]


class ClosingTokenizer(MergingTokenizer):
    """One that puts an end token after every text."""

    eos_token_id = 99

    def __call__(self, text):
        return {"input_ids": [*super().__call__(text)["input_ids"], 99]}


def test_an_end_token_after_the_text_is_left_out():
    closed, open_ = (tokens(Template("{input}"), make(), "a:", "y") for make in (ClosingTokenizer, MergingTokenizer))
    assert closed == (open_[0], [*open_[1], ClosingTokenizer.eos_token_id])


@pytest.mark.parametrize(("query", "answer", "named"), [(" ", "y", "prompt is empty"), ("a", " ", "answer is ' '")])
def test_an_empty_prompt_or_answer_is_refused(query, answer, named):
    with refused(named, "expected some text"):
        tokens(Template("{input}"), Letters(), query, answer)


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_an_answer_has_the_same_tokens_behind_every_prompt(make):
    tokenizer, task = make(), toy_task()
    for render in task.renderers().values():
        expected = answer_ids(tokenizer, render, task.options)
        for example in task.test:
            prompt = render.prompt(tokenizer, example)
            assert [tuple(render.answer(tokenizer, prompt, option)) for option in task.options] == list(expected)


# ---- Template ----


def test_without_a_prefix_nothing_stands_behind_the_text():
    render = Template("Q: {input} !")
    assert Letters.text(render.prompt(Letters(), Example("is it", "")).ids) == "Q: is it !"
    assert Letters.text(render.answer(Letters(), render.prompt(Letters(), Example("is it", "")), "yes")) == " yes"


@pytest.mark.parametrize("end", ["\n", " ", ":\n\n"])
def test_behind_a_text_that_ends_in_white_space_the_answer_follows_directly(end):
    render, shot = Template(f"{{input}}{end}"), Example("a", "b")
    assert [Letters.text(ids) for ids in tokens(render, Letters(), "x", "yes")] == [f"x{end}", "yes"]
    assert Letters.text(render.prompt(Letters(), Example("x", ""), [shot]).ids) == f"a{end}b\n\nx{end}"


def test_demonstrations_stand_before_the_query_with_their_answers_and_are_not_read_by_the_generator():
    render = Template("Q {input}", "A:", "about {input}")
    prompt = render.prompt(Letters(), Example("z", "no"), [Example("x", "yes"), Example("y", "no")])
    assert Letters.text(prompt.ids) == "Q x\nA: yes\n\nQ y\nA: no\n\nQ z\nA:"
    assert prompt[1:] == ("about z", 2, "")


@pytest.mark.parametrize("options", [{"text": "no place"}, {"text": "{input}", "query": "none"}])
def test_a_template_without_a_place_for_the_query_is_refused(options):
    with refused("has no {input}", "put {input}"):
        Template(**options)


def test_a_blank_answer_prefix_is_refused():
    with refused("answer prefix is ' '", "None for no prefix"):
        Template("{input}", " ")
    for prefixes in ((), ("A:", "")):
        with refused("Task toy: the answer prefixes are", "expected at least one"):
            dataclasses.replace(toy_task(), answer_prefixes=prefixes)


def test_a_text_is_its_own_prompt_and_query():
    assert plain_prompt(Letters(), "is {input} it?\nA:") == Prompt(
        list(map(ord, "is {input} it?\nA:")), "is {input} it?\nA:"
    )


# ---- the renderers of a task ----


def test_each_renderer_of_a_task_asks_in_its_own_way_and_the_generator_reads_the_same():
    task, example = toy_task(), Example("the harbour", "")
    renderers = task.renderers("diagonal", "prompt")
    assert list(renderers) == [(0, "A:"), (1, "Answer:"), (2, "The answer is")]
    prompts = [render.prompt(Letters(), example) for render in renderers.values()]
    assert [Letters.text(prompt.ids) for prompt in prompts] == [prompt_text(task, "the harbour", *v) for v in renderers]
    assert {prompt.query for prompt in prompts} == {"the harbour\nyes or no?\nA:"}
    assert len({tuple(tokens(render, Letters(), "x", "yes")[1]) for render in renderers.values()}) == 1


@pytest.mark.parametrize(("reads", "query"), [("query", "so\nit is"), ("prompt", "so\nit is\nyes or no?\nA:")])
def test_what_the_generator_reads_is_the_query_or_the_first_template(reads, query):
    task, example = toy_task(), Example("so\nit is", "yes")
    ways = [*task.renderers("all", reads).values(), *task.training_renderers(reads)]
    assert {render.prompt(Letters(), example, task.train[:2]).query for render in ways} == {query}
    for row in training_rows(task, reads=reads):
        assert row.renderers[1].prompt(Letters(), row.example).query == query.replace("so\nit is", row.example.input)


def test_without_prefixes_training_and_evaluation_read_the_bare_templates():
    task = dataclasses.replace(toy_task(), answer_prefixes=(None,))
    assert list(task.renderers()) == [(0, None), (1, None), (2, None)]
    for ways in (task.renderers().values(), task.training_renderers()):
        texts = [Letters.text(render.prompt(Letters(), Example("x", "")).ids) for render in ways]
        assert texts == ["x\nyes or no?", "Question: x", "Is it so? x"]
    assert task.renderers(reads="prompt")[1, None].prompt(Letters(), Example("x", "")).query == "x\nyes or no?"


def test_a_task_file_may_name_its_answer_prefixes(tmp_path):
    rows = {split: f'[{{"input": "{split} a", "output": "yes"}}]' for split in ("train", "valid", "test")}
    splits = ", ".join(f'"{split}": {listed}' for split, listed in rows.items())
    (tmp_path / "templates.json").write_text('{"one": ["{input}"]}')
    for said, expected in (
        ('"answer_prefixes": [null], ', (None,)),
        ('"answer_prefixes": ["=>"], ', ("=>",)),
        ("", None),
    ):
        (tmp_path / "one.json").write_text(f"{{{said}{splits}}}")
        prefixes = load_task("one", tmp_path).answer_prefixes
        assert prefixes == (expected or ("A:", "Answer:", "The answer is"))
    for said in ('"A:"', "[3]"):
        (tmp_path / "one.json").write_text(f'{{"answer_prefixes": {said}, {splits}}}')
        with refused("one.json", "answer_prefixes", "[null] for none"):
            load_task("one", tmp_path)


# ---- a renderer of one's own ----

TURN, END = 390, 391
"""Token ids that no text has, as a chat template puts around turns."""


@dataclasses.dataclass(frozen=True)
class Turns:
    """As a chat template: turns between tokens of their own, demonstrations as turns, an end behind an answer."""

    text: str
    answer_prefix: str | None
    query: str
    system: str = ""

    def _turn(self, tokenizer: Any, text: str) -> list[int]:
        return [TURN, *tokenizer(text)["input_ids"], END]

    def prompt(self, tokenizer: Any, example: Example, shots: Sequence[Example] = ()) -> Prompt:
        ids = self._turn(tokenizer, self.system) if self.system else []
        for shot in shots:
            ids += self._turn(tokenizer, self.text.replace("{input}", shot.input))
            ids += self._turn(tokenizer, shot.output)
        ids += [*self._turn(tokenizer, self.text.replace("{input}", example.input)), TURN]
        return Prompt(ids, self.query.replace("{input}", example.input), len(shots))

    def answer(self, tokenizer: Any, prompt: Prompt, text: str) -> list[int]:
        assert prompt.ids[-1] == TURN
        return [*tokenizer(text)["input_ids"], END]


def test_a_renderer_of_ones_own_trains_and_evaluates(tmp_path, monkeypatch):
    brief = partial(Turns, system="be brief")
    task = dataclasses.replace(toy_task(), renderer=brief, answer_prefixes=(None,))
    atv = make_atv(dtype=torch.float32, reads="prompt", scale=0.5)
    tokenizer, trained = atv.tokenizer, []
    monkeypatch.setattr(ATVModel, "calibrate", lambda _, rows: trained.extend(rows))
    config = TrainConfig.paper(epochs=1, batch_size=4, learning_rate=5e-3, generator_learning_rate=5e-3)
    result = train(atv, [task], tmp_path / "train", config)
    assert "Turns" in result.record["settings"]["tasks"]["toy"]["asking"]["renderer"]["custom"]
    begins = [TURN, *tokenizer("be brief")["input_ids"], END, TURN]
    assert len(trained) == len(task.train)
    for encoded, row in zip(trained, task.train, strict=True):
        texts = [template.replace("{input}", row.input) for template in task.templates]
        answer = [*tokenizer(row.output)["input_ids"], END]
        assert encoded.pairs == [([*begins, *tokenizer(text)["input_ids"], END, TURN], answer) for text in texts]
        assert encoded.query == atv.generator.encode([texts[0]])[0]
    run = RunWriter(tmp_path / "run", {})
    evaluate(ATVMethod(atv), [task], ["first_token"], run, variants="first")
    assert len(run.rows) == len(task.test)
    for row in run.rows:
        text = task.templates[0].replace("{input}", task.test[row["example"]].input)
        ids = [*begins, *tokenizer(text)["input_ids"], END, TURN]
        with torch.no_grad(), atv.steer([text]):
            token = atv.llm(input_ids=torch.tensor([ids])).logits[0, -1].argmax()
        assert row["outputs"]["first_token"] == tokenizer.decode([token])
        assert (row["prompt_tokens"], row["answer_prefix"]) == (len(ids), None)


def test_demonstrations_and_answers_of_ones_own_renderer_reach_other_methods():
    task = dataclasses.replace(toy_task(), renderer=Turns, answer_prefixes=(None,))
    icl = ICL.load(make_llm(), byte_level_tokenizer(), None, shots=2)
    (render,) = task.renderers("first").values()
    for prompt, example in zip(icl.prompts(task, task.test, render), task.test, strict=True):
        shown = icl.demonstrations(task, [example])[0]
        assert prompt == render.prompt(icl.tokenizer, example, shown)._replace(task="toy")
        assert prompt.ids.count(TURN) == 2 * len(shown) + 2
    ids = [(*icl.tokenizer(option)["input_ids"], END) for option in task.options]
    assert training_options(icl.tokenizer, task).ids == ids


def test_what_is_no_renderer_is_refused():
    with refused("Task toy: its renderer makes a str", "prompt and answer"):
        dataclasses.replace(toy_task(), renderer=lambda text, *_: text).renderers()

    class Mutable(Turns):
        __hash__ = None

    with refused("its renderer makes a Mutable", "hashable"):
        dataclasses.replace(toy_task(), renderer=Mutable).renderers()
