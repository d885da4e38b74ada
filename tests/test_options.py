"""Options that begin alike: told apart, found by the search, read on behind the prompt; against formulas by hand."""

import dataclasses
import itertools
import json
import math
from collections import Counter
from functools import cache, partial

import pytest
import torch
from conftest import byte_level_tokenizer, make_atv, make_llm, sentencepiece_tokenizer, toy_task
from hypothesis import given, settings
from hypothesis import strategies as st
from labels import LABELS, added, labelled, steered_by_hand
from refusals import refused
from rendering import encode_pair, prompt_text
from transformers import MambaConfig, MambaForCausalLM, set_seed

from atv.config import ATVConfig, Positions, TrainConfig
from atv.data import Rendering
from atv.data.collate import left_padded
from atv.data.render import plain_prompt
from atv.evaluation.records import RunWriter
from atv.evaluation.run import evaluate, steered
from atv.lm.continuation import Continuation
from atv.lm.prefix import call_llm
from atv.lm.scoring import Options, answers_right, task_options, training_options
from atv.methods import METHODS, exemplars
from atv.methods.atv import ATVMethod
from atv.methods.i2cl import I2CL, I2CLConfig, I2CLModel
from atv.methods.lora import LoRA
from atv.methods.peft_model import PEFTModel
from atv.methods.prefix_tuning import PrefixTuning
from atv.model import ATVModel
from atv.paper.analysis.swapped import OWN, exchanged
from atv.paper.sweep import _judged
from atv.progress import bar
from atv.steer import AddVectors
from atv.training.loop import train

# ---- told apart, and the search, against the definition ----


def beginning(options, number):
    """The tokens that tell an option apart, by comparing it with every other; and what must not follow them."""
    own, others = options[number], [row for place, row in enumerate(options) if place != number]
    for length in range(1, len(own) + 1):
        if not any(other[:length] == own[:length] for other in others):
            return own[:length], []
    return own, sorted({other[len(own)] for other in others if other[: len(own)] == own})


class TableLM:
    """A distribution over a vocabulary of 5 for every beginning, drawn by that beginning."""

    def __init__(self, seed, sharpness):
        self.seed, self.sharpness, self.read = seed, sharpness, 0

    def __call__(self, prefix):
        draw = torch.Generator().manual_seed(hash((self.seed, prefix)) % 2**31)
        return (self.sharpness * torch.randn(5, generator=draw, dtype=torch.float64)).log_softmax(-1)


def probability(lm, options, number):
    tokens, barred = beginning(options, number)
    value = math.prod(lm(tokens[:place])[token].exp().item() for place, token in enumerate(tokens))
    return value * (1 - sum(lm(tokens)[token].exp().item() for token in barred))


OPTIONS = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6).map(tuple), min_size=1, max_size=12, unique=True)


@settings(max_examples=150, deadline=None)
@given(OPTIONS, st.integers(0, 1000), st.sampled_from([0.3, 1.0, 4.0]))
def test_the_search_finds_the_option_with_the_highest_probability_of_the_definition(ids, seed, sharpness):
    options, lm = Options([str(row) for row in ids], ids), TableLM(seed, sharpness)
    for number, row in enumerate(ids):
        tokens, barred = beginning(ids, number)
        assert options.judged[str(row)] == len(tokens) + bool(barred)
    assert options.told_apart == all(
        len(beginning(ids, n)[0]) == 1 and not beginning(ids, n)[1] for n in range(len(ids))
    )
    search = options.search(lm(()))
    try:
        prefix = next(search)
        while True:
            assert 0 < len(prefix) <= options.longest
            prefix = search.send([lm(prefix[: place + 1]) for place in range(len(prefix))])
    except StopIteration as end:
        chosen = end.value
    chances = [probability(lm, ids, number) for number in range(len(ids))]
    assert sum(chances) <= 1 + 1e-9
    assert chances[chosen] == pytest.approx(max(chances), rel=1e-9)


def test_what_cannot_win_is_not_read():
    ids = [(0, a, b) for a in range(5) for b in range(5)] + [(1,)]
    for first, reads in ((math.log(0.9), 0), (math.log(0.001), 1)):
        search = Options([str(row) for row in ids], ids).search(torch.tensor([math.log(0.05), first, -9.0, -9.0, -9.0]))
        count = 0
        try:
            prefix = next(search)
            while count < 9:
                count += 1
                last = torch.tensor([0.0, -99.0, -99.0, -99.0, -99.0])
                prefix = search.send([last] * len(prefix))
        except StopIteration:
            pass
        assert count == (0 if reads == 0 else 2)  # the first token of 25, then the second of five of them


@pytest.mark.parametrize("said", [0, 1, 2])
def test_a_model_that_always_says_the_same_is_right_for_its_option_alone(said):
    ids = [(1,), (1, 2), (1, 3)]  # very, very good, very bad
    texts = ["very", "very good", "very bad"]
    options = Options(texts, ids)
    judged = torch.tensor([options.judged[text] for text in texts])
    assert judged.tolist() == [2, 2, 2]
    says = torch.tensor((*ids[said], 9)[:2])
    labels = torch.tensor([(*row, -100)[:2] for row in ids])
    right = answers_right(labels == says, judged).tolist()
    assert right == [text == texts[said] and text != "very" for text in texts]


def test_options_of_the_same_tokens_are_refused_before_anything_is_asked(tmp_path):
    tokenizer = sentencepiece_tokenizer()
    task = labelled(("正面", "负面"))
    method = METHODS["zero-shot"].load(make_llm(), tokenizer, None)
    with refused("Task labels: 2 answers", "正面", "Write them differently"):
        evaluate(method, [task], ["first_token"], RunWriter(tmp_path, {}), variants="first")
    assert (tmp_path / "predictions.jsonl").read_text() == ""
    with refused("answers have the tokens of another"):
        training_options(tokenizer, task)


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_options_are_encoded_as_they_follow_whole_prompts(make):
    tokenizer = make()
    task = dataclasses.replace(labelled(("yes", "no", "yesterday", "one", "True or False")), templates=("{input} x",))
    for variant, render in task.renderers().items():
        text = prompt_text(task, task.test[3].input, *variant)
        expected = [tuple(encode_pair(tokenizer, text, option)[1]) for option in task.options]
        assert task_options(tokenizer, task, render).ids == expected


# ---- evaluation, against full passes for one prompt and option at a time ----


def score(read, ids, number):
    """An option's log-probability by its definition; `read` gives the logits behind the prompt and answer tokens."""
    tokens, barred = beginning(ids, number)
    total = sum(read(tokens[:place]).log_softmax(-1)[token].item() for place, token in enumerate(tokens))
    if not barred:
        return total
    return total + math.log(1 - read(tokens).softmax(-1)[barred].sum().item())


def run(method, task, folder, variants="first", batch_size=5):
    writer = RunWriter(folder, {})
    evaluate(method, [task], ["first_token"], writer, variants=variants, batch_size=batch_size)
    return writer.rows


def check(method, task, folder, read, variants="first"):
    """Every row of a run says the option that `read` finds the likeliest, and not all rows the same."""
    rows = run(method, task, folder, variants)
    apart = {}
    for row in rows:
        variant = row["template"], row["answer_prefix"]
        example = task.test[row["example"]]
        prompt = method.prompts(task, [example], task.renderers()[variant])[0].ids
        plain = prompt_text(task, example.input, *variant)
        ids = [tuple(encode_pair(method.tokenizer, plain, option)[1]) for option in task.options]
        once = cache(partial(read, example, prompt))
        scores = [score(once, ids, number) for number in range(len(ids))]
        ordered = sorted(scores)
        assert ordered[-1] - ordered[-2] > 1e-6
        assert row["outputs"]["first_token_among_options"] == task.options[scores.index(ordered[-1])], scores
        assert row["scores"]["first_token_among_options"] == (
            row["outputs"]["first_token_among_options"] == row["target"]
        )
        apart[row["template"]] = len({i[0] for i in ids}) == len(ids)
        assert (row["scores"]["first_token"] is None) == (not apart[row["template"]])
    return rows


def plainly(llm):
    def read(_, prompt, answer):
        with torch.no_grad():
            return llm(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, -1]

    return read


NAMES = ["llama", "mistral", "gpt2", "opt", "gemma3", "peft"]


@pytest.mark.parametrize("labels", LABELS)
def test_label_sets_that_begin_alike_are_judged_by_what_differs(labels, tmp_path):
    llm, task = make_llm(), labelled(LABELS[labels], rows=6)
    method = METHODS["zero-shot"].load(llm, byte_level_tokenizer(), None)
    assert not training_options(method.tokenizer, task).told_apart
    rows = check(method, task, tmp_path, plainly(llm))
    assert all(row["scores"]["first_token"] is None for row in rows)
    right = Counter(row["scores"]["first_token_among_options"] for row in rows)[True]
    assert right < len(rows)


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_with_every_kind_of_cache(name, tmp_path):
    llm = make_llm(name)
    method = METHODS["zero-shot"].load(llm, byte_level_tokenizer(), None)
    task = labelled(("very", "very good", "very bad", "fish", "The quay", "The boats are in"), rows=8)
    check(method, task, tmp_path, plainly(llm))


def test_an_llm_without_a_cache_of_keys_reads_again(tmp_path):
    set_seed(1)
    llm = MambaForCausalLM(
        MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, initializer_range=0.4)
    ).eval()
    method = METHODS["zero-shot"].load(llm.double(), byte_level_tokenizer(), None)
    check(method, labelled(LABELS["nested"], rows=6), tmp_path, plainly(llm))


@pytest.mark.parametrize("positions", ["last", "last:3", "answer", "all"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "opt"])
def test_vectors_are_added_where_positions_say_while_options_are_read(name, positions, tmp_path):
    atv = make_atv(name, positions=positions, scale=2.0)
    task = labelled(("very", "very good", "very bad", "The quay", "The boats are in"), rows=3)
    method, examples = ATVMethod(atv), list(task.test)
    asked = method.prompts(task, examples, task.training_renderers()[0])
    prompts = [prompt.ids for prompt in asked]
    inputs, by_hand = left_padded(prompts, 0), steered_by_hand(atv, positions)
    with torch.no_grad(), steered(method, asked):
        read = Continuation(atv.llm, inputs, call_llm(atv.llm, keep=1, **inputs, use_cache=True)).read
        found = [(prefixes, read(prefixes)) for prefixes in ([(5, 6, 7), (), (8,)], [(9,), (5, 7), (5, 6)])]
    for prefixes, tables in found:
        assert [len(table) for table in tables] == [len(prefix) for prefix in prefixes]
        for example, prompt, prefix, table in zip(examples, prompts, prefixes, tables, strict=True):
            for place, following in enumerate(table):
                expected = by_hand(example, prompt, prefix[: place + 1]).log_softmax(-1)
                assert torch.allclose(following.double(), expected, atol=1e-4)
                plain = plainly(atv.llm)(None, prompt, prefix[: place + 1]).log_softmax(-1)
                assert not torch.allclose(following.double(), plain, atol=1e-3)
    check(method, task, tmp_path, by_hand)


def test_what_prompts_share_is_read_once_here_too(tmp_path):
    llm = make_llm()
    method = METHODS["icl"].load(llm, byte_level_tokenizer(), None, shots=2)
    rows = check(method, labelled(LABELS["nested"], rows=6), tmp_path, plainly(llm))
    assert all(row["demonstrations"] == 2 for row in rows)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("kind", [LoRA, PrefixTuning])
def test_peft_adapters_read_options_too(kind, name, tmp_path):
    set_seed(4)
    model = PEFTModel(make_llm(name), byte_level_tokenizer(), kind, kind.config_class()).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.5)
    method = kind(model)

    def read(_, prompt, answer):
        ids = torch.tensor([[*prompt, *answer]])
        positions = torch.arange(ids.shape[1])[None]
        with torch.no_grad():
            return method.llm(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits[0, -1]

    check(method, labelled(LABELS["nested"], rows=6), tmp_path, read)


@pytest.mark.parametrize("positions", ["last", "all"])
def test_the_llm_as_its_own_generator_steers_options_by_its_prompts(positions, tmp_path):
    set_seed(3)
    config = ATVConfig(generator="self", parametrisation="paper", scale=1.0, positions=positions)
    atv = ATVModel(make_llm(), config, tokenizer=byte_level_tokenizer()).double().eval()

    def read(_, prompt, answer):
        columns = [len(prompt) - 1] if positions == "last" else list(range(len(prompt) + len(answer)))
        with torch.no_grad():
            plain = atv.llm(input_ids=torch.tensor([prompt]), output_hidden_states=True)
            vectors = atv.expansion(plain.hidden_states[atv.generator.index + 1][:, -1])[0]
            with added(atv.layers, vectors, columns):
                return atv.llm(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, -1]

    check(ATVMethod(atv), labelled(LABELS["nested"], rows=6), tmp_path, read)


def test_i2cl_mixes_into_option_tokens_too(tmp_path):
    task, llm = labelled(LABELS["nested"], rows=6), make_llm()
    model = I2CLModel(llm, I2CLConfig(demonstrations=3, initial_context=0.6), byte_level_tokenizer()).read([task], 0)
    method = I2CL(model)

    def read(example, prompt, answer):
        with torch.no_grad(), steered(method, method.prompts(task, [example], task.training_renderers()[0])):
            return llm(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, -1]

    check(method, task, tmp_path, read)


def test_a_state_at_the_last_prompt_token_stays_there(tmp_path):
    """What ELICIT does: positions `last` and ready states."""
    llm, task = make_llm(), labelled(LABELS["nested"], rows=6)
    torch.manual_seed(0)
    state = torch.randn(1, 3, 32, dtype=torch.float64)

    class Stated(METHODS["zero-shot"]):
        edited_tokens = 1

        def edit(self, prompts):
            states = state.expand(len(prompts), -1, -1)
            return AddVectors(list(llm.model.layers), states, 2.0, Positions.parse("last"))

    def read(_, prompt, answer):
        with torch.no_grad(), added(llm.model.layers, 2.0 * state[0], [len(prompt) - 1]):
            return llm(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, -1]

    check(Stated(llm, byte_level_tokenizer()), task, tmp_path, read)


def test_where_first_tokens_differ_one_pass_and_the_first_tokens_decide(tmp_path):
    llm, task = make_llm(), toy_task()
    method = METHODS["zero-shot"].load(llm, byte_level_tokenizer(), None)
    calls = []
    handle = llm.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    rows = run(method, task, tmp_path, batch_size=8)
    handle.remove()
    assert len(calls) == 1
    assert not calls[0]["use_cache"]
    for row in rows:
        prompt = prompt_text(task, task.test[row["example"]].input)
        logits = plainly(llm)(None, method.tokenizer(prompt)["input_ids"], [])
        first = {o: encode_pair(method.tokenizer, prompt, o)[1][0] for o in task.options}
        assert row["outputs"]["first_token_among_options"] == max(first, key=lambda option: logits[first[option]])
        assert row["scores"]["first_token"] == (int(logits.argmax()) == first[row["target"]])


def test_a_query_is_cut_where_a_prompt_fits_without_an_options_beginning(tmp_path, capsys):
    llm, task = make_llm(), labelled(LABELS["classes"], rows=6)
    method = METHODS["zero-shot"].load(llm, byte_level_tokenizer(), None)
    longest = max(len(prompt.ids) for prompt in method.prompts(task, task.test, task.training_renderers()[0]))
    behind = training_options(method.tokenizer, task).longest
    llm.config.max_position_embeddings = longest + behind
    assert max(row["prompt_tokens"] for row in run(method, task, tmp_path / "fits")) == longest
    assert "are cut" not in capsys.readouterr().err
    llm.config.max_position_embeddings -= 1
    assert max(row["prompt_tokens"] for row in run(method, task, tmp_path / "long")) == longest - 1
    assert f"context of {longest + behind - 1} tokens" in capsys.readouterr().err
    shown = METHODS["icl"].load(llm, method.tokenizer, None, shots=16)
    llm.config.max_position_embeddings = 3 * longest
    for prompt in shown.prompts(task, task.test, task.training_renderers()[0]):
        assert 0 < prompt.demonstrations < 16
        assert len(prompt.ids) + behind <= 3 * longest


class Counting:
    """A tokenizer that counts what it is asked."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.tokenizer(*args, **kwargs)


def test_hundreds_of_options_are_encoded_once_however_many_rows_are_asked(tmp_path):
    words = tuple(f"{a}{b}{c}" for a, b, c in itertools.product("bcdfghklmn", "aeiou", "bcdfghklmn"))
    assert len(set(words)) == 500
    calls = []
    for rows in (4, 24):
        task = labelled(words, rows=24).drawn(None, None, 0, test=rows)
        tokenizer = Counting(byte_level_tokenizer())
        method = METHODS["zero-shot"].load(make_llm(), tokenizer, None)
        assert len(run(method, task, tmp_path / str(rows), variants="all", batch_size=24)) == 9 * rows
        calls.append(tokenizer.calls)
    assert calls[1] - calls[0] == 9 * 20  # the prompts of the further rows
    assert calls[0] < 3 * 500 + 9 * 4 + 50  # three answer prefixes


# ---- training, ELICIT's layers, the analysis ----


def test_validation_accuracy_counts_the_tokens_that_tell_an_answer_apart(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("atv.progress._WARNED", set())
    task = dataclasses.replace(labelled(("1", "2", "3", "10"), rows=8), renderer=Rendering("template", ends=False))
    atv = make_atv(dtype=torch.float32)
    record = train(atv, [task], tmp_path, TrainConfig(epochs=1, batch_size=4)).record
    shown = next(entry["eval_accuracy"] for entry in record["history"] if "eval_accuracy" in entry)
    right = []
    for example, template in itertools.product(task.valid, range(3)):
        prompt, _ = encode_pair(atv.tokenizer, prompt_text(task, example.input, template), example.output)
        read = steered_by_hand(atv, "last")
        without_end = [tuple(encode_pair(atv.tokenizer, "A:", option)[1][:-1]) for option in task.options]
        tokens, barred = beginning(without_end, task.options.index(example.output))
        hits = [int(read(example, prompt, tokens[:place]).argmax()) == token for place, token in enumerate(tokens)]
        right.append(all(hits) and not barred)
    assert shown == pytest.approx(sum(right) / len(right))
    said = capsys.readouterr().err
    assert "labels: the answers '1', '10', '2', '3' begin with the same token after 'A:'" in said
    assert "other answers continue '1'; validation rows with such an answer count as wrong" in said


def test_validation_accuracy_of_answers_that_all_begin_alike_is_not_a_hundred(tmp_path):
    """A model that has learned nothing but the token that all answers begin with."""
    task = labelled(LABELS["opinions"], rows=8)
    atv = make_atv(dtype=torch.float32)
    shared = encode_pair(atv.tokenizer, "A:", "very good")[1][0]
    with torch.no_grad():
        atv.llm.lm_head.bias = torch.nn.Parameter(torch.zeros(400), requires_grad=False)
        atv.llm.lm_head.bias[shared] = 1e3
    record = train(atv, [task], tmp_path, TrainConfig(epochs=1, batch_size=4)).record
    assert [entry["eval_accuracy"] for entry in record["history"] if "eval_accuracy" in entry] == [0.0]


def test_the_best_layer_is_chosen_by_the_tokens_that_tell_an_answer_apart():
    llm, tokenizer, task = make_llm(), byte_level_tokenizer(), labelled(LABELS["nested"], rows=6)
    torch.manual_seed(0)
    states = 3 * torch.randn(2, 3, 32, dtype=torch.float64)
    right, likely = exemplars.layer_scores(llm, tokenizer, task, states, 2.0, rows=task.valid[:5])
    ids = [tuple(encode_pair(tokenizer, "A:", option)[1]) for option in task.options]
    for exemplar, layer in itertools.product(range(2), range(3)):
        hits, chances = [], []
        for number, row in enumerate(task.valid[:5]):
            prompt, _ = encode_pair(tokenizer, prompt_text(task, row.input, number % 3), row.output)
            tokens, barred = beginning(ids, task.options.index(row.output))
            vector = 2.0 * states[exemplar, layer]
            total, hit = 0.0, not barred
            for place, token in enumerate(tokens):
                with torch.no_grad(), added([llm.model.layers[layer]], [vector], [len(prompt) - 1]):
                    logits = llm(torch.tensor([[*prompt, *tokens[:place]]])).logits[0, -1]
                total += logits.log_softmax(-1)[token].item()
                hit = hit and int(logits.argmax()) == token
            hits.append(float(hit))
            chances.append(total)
        assert right[exemplar, layer].item() == pytest.approx(sum(hits) / 5)
        assert likely[exemplar, layer].item() == pytest.approx(sum(chances) / 5, rel=1e-5)


def test_answers_with_other_vectors_are_judged_alike():
    atv = make_atv(scale=2.0)
    apart, alike = toy_task("apart"), labelled(LABELS["nested"], rows=4)
    asked = [(task, example) for task in (apart, alike) for example in task.test[:4]]
    prompts = [prompt_text(task, example.input) for task, example in asked]
    vectors = atv.config.scale * atv.task_vectors([example.input for _, example in asked])
    with bar("x", 99) as progress:
        found = exchanged(atv, asked, [plain_prompt(atv.tokenizer, text) for text in prompts], vectors, progress)
    read = steered_by_hand(atv, "last")
    for (task, example), prompt, kinds in zip(asked, prompts, found, strict=True):
        ids = [tuple(encode_pair(atv.tokenizer, prompt, option)[1]) for option in task.options]
        prompt_ids = encode_pair(atv.tokenizer, prompt, "x")[0]
        scores = [score(partial(read, example, prompt_ids), ids, number) for number in range(len(ids))]
        best = task.options[scores.index(max(scores))]
        assert kinds[OWN]["first_token_among_options"] == (best == example.output)
        assert (kinds[OWN]["first_token"] is None) == (task is alike)
        assert not kinds[OWN]["other"]


def test_rows_hold_null_where_the_first_token_says_nothing(tmp_path):
    run(METHODS["zero-shot"].load(make_llm(), byte_level_tokenizer(), None), labelled(LABELS["tens"]), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert {row["scores"]["first_token"] for row in rows} == {None}


def test_a_sweep_takes_the_score_among_options_where_the_papers_is_not_defined():
    def judged(said, score):
        return _judged({"scores": {"first_token": said, "first_token_among_options": 1.0}}, score)

    assert [judged(said, "first_token") for said in (None, 0.0, 1.0)] == [1.0, 0.0, 1.0]
    assert judged(None, "first_token_among_options") == 1.0


def test_options_that_lack_an_answer_are_refused(tmp_path):
    task = dataclasses.replace(labelled(("1", "2", "3"), rows=6), options=("1", "2"))
    method = METHODS["zero-shot"].load(make_llm(), byte_level_tokenizer(), None)
    with refused("Task", "the answer '3' is not among its options (1, 2)", "leave options out"):
        run(method, task, tmp_path, variants="first")
