"""Metrics: against one full pass per option, transformers' generate, formulas by hand and scikit-learn."""

import dataclasses
import importlib
import inspect
import json
import math
import sys

import pytest
import torch
from conftest import byte_level_tokenizer, make_atv, make_llm, sentencepiece_tokenizer, toy_task
from hypothesis import given, settings
from hypothesis import strategies as st
from labels import LABELS, labelled, steered_by_hand
from refusals import refused
from rendering import encode_pair, prompt_text
from sklearn.metrics import f1_score, precision_score, recall_score
from transformers import MambaConfig, MambaForCausalLM, set_seed

from atv.data import Example, Task
from atv.data.task import FEW_OPTIONS
from atv.errors import ATVError
from atv.evaluation.measure import Frozen, measure
from atv.evaluation.metrics import (
    ExactMatch,
    Likelihoods,
    TokenF1,
    UserMetric,
    default_metric,
    load_metric,
)
from atv.evaluation.records import RunWriter, load_runs
from atv.evaluation.requests import MOST_TOKENS, Requests
from atv.evaluation.run import evaluate, metrics_of, steered
from atv.lm import continuation
from atv.lm.scoring import task_options
from atv.methods import METHODS, Choice, Method
from atv.methods.atv import ATVMethod
from atv.methods.i2cl import I2CL, I2CLConfig, I2CLModel
from atv.methods.lora import LoRA
from atv.methods.peft_model import PEFTModel
from atv.methods.prefix_tuning import PrefixTuning
from atv.report import classification_details, classification_tables, label_table, score_table

SOME = ("fish", "The quay", "The boats are in", "very", "very good", "very bad", "yes or no")


def zero_shot(llm, tokenizer=None):
    return METHODS["zero-shot"].load(llm, tokenizer or byte_level_tokenizer(), None)


def by_hand(read, ids, number):
    """The log-probability of an option: one full pass for each of its tokens; it must end where others go on."""
    own = ids[number]
    total = sum(read(own[:place]).log_softmax(-1)[token].item() for place, token in enumerate(own))
    further = {other[len(own)] for other in ids if other != own and other[: len(own)] == own}
    return total + (math.log(1 - read(own).softmax(-1)[list(further)].sum().item()) if further else 0.0)


def scored(method, task, folder, monkeypatch, read, **how):
    """Rows by the metric, and the log-probabilities that they come from, against the loop by hand."""
    seen = []
    original = continuation.Continuation.log_likelihoods

    def watched(self, options):
        seen.append(original(self, options))
        return seen[-1]

    monkeypatch.setattr(continuation.Continuation, "log_likelihoods", watched)
    rows = evaluate(method, [task], ["option_likelihood"], RunWriter(folder, {}), variants="first", **how)
    render = task.training_renderers()[0]
    prompts = [prompt.ids for prompt in method.prompts(task, task.test, render)]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found = dict(zip(order, torch.cat(seen).tolist(), strict=True))
    for row in rows:
        example, prompt = task.test[row["example"]], prompts[row["example"]]
        plain = prompt_text(task, example.input)
        ids = [tuple(encode_pair(method.tokenizer, plain, option)[1]) for option in task.options]
        expected = [by_hand(lambda answer, e=example, p=prompt: read(e, p, answer), ids, n) for n in range(len(ids))]
        assert found[row["example"]] == pytest.approx(expected, abs=2e-3, rel=1e-4)
        sizes = [len(option.encode()) for option in task.options]
        per_byte = [value / size for value, size in zip(expected, sizes, strict=True)]
        best, best_per_byte = (task.options[max(range(len(s)), key=s.__getitem__)] for s in (expected, per_byte))
        assert row["outputs"] == {"option_likelihood": best, "option_likelihood_per_byte": best_per_byte}
        assert row["scores"] == {
            "option_likelihood": float(best == row["target"]),
            "option_likelihood_per_byte": float(best_per_byte == row["target"]),
        }
    assert len({len(prompt) for prompt in prompts}) > 1  # there is padding
    return rows


def plainly(llm):
    def read(_, prompt, answer):
        with torch.no_grad():
            return llm(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, -1]

    return read


# ---- option_likelihood ----


@pytest.mark.parametrize(
    ("name", "at_once"),
    [(name, 512) for name in ("llama", "mistral", "gpt2", "gpt_neox", "gemma3", "opt", "peft")]
    + [("llama", 1), ("mistral", 1)]
    + [pytest.param(name, 1, marks=pytest.mark.exhaustive) for name in ("gpt2", "gpt_neox", "gemma3", "opt", "peft")],
)
def test_option_likelihood_is_that_of_a_pass_per_token_without_a_cache(name, at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(continuation, "SCORED_TOKENS", at_once)
    llm = make_llm(name)
    scored(zero_shot(llm), labelled(SOME, rows=7), tmp_path, monkeypatch, plainly(llm), batch_size=4)


def test_an_llm_without_a_cache_of_keys_reads_the_prompts_again(tmp_path, monkeypatch):
    set_seed(1)
    config = MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, initializer_range=0.4)
    llm = MambaForCausalLM(config).eval().double()
    scored(zero_shot(llm), labelled(SOME, rows=6), tmp_path, monkeypatch, plainly(llm))


@pytest.mark.parametrize("positions", ["last", "last:3", "answer", "all"])
@pytest.mark.parametrize("name", ["llama", pytest.param("mistral", marks=pytest.mark.exhaustive)])
def test_whole_options_are_steered_as_answers_are(name, positions, tmp_path, monkeypatch):
    atv = make_atv(name, positions=positions, scale=2.0)
    scored(ATVMethod(atv), labelled(SOME, rows=6), tmp_path, monkeypatch, steered_by_hand(atv, positions), batch_size=4)


def test_i2cl_mixes_into_whole_options(tmp_path, monkeypatch):
    task, llm = labelled(SOME, rows=6), make_llm()
    model = I2CLModel(llm, I2CLConfig(demonstrations=3, initial_context=0.6), byte_level_tokenizer()).read([task], 0)
    method = I2CL(model)

    def read(example, prompt, answer):
        with torch.no_grad(), steered(method, method.prompts(task, [example], task.training_renderers()[0])):
            return llm(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, -1]

    scored(method, task, tmp_path, monkeypatch, read)


@pytest.mark.parametrize("kind", [LoRA, PrefixTuning])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_peft_adapters_score_whole_options(kind, name, tmp_path, monkeypatch):
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

    scored(method, labelled(SOME, rows=6), tmp_path, monkeypatch, read)


def test_demonstrations_that_all_prompts_share_are_read_once(tmp_path, monkeypatch):
    llm = make_llm()
    method = METHODS["icl"].load(llm, byte_level_tokenizer(), None, shots=2)
    scored(method, labelled(("fish", "The quay", "The boats"), rows=6), tmp_path, monkeypatch, plainly(llm))


def test_prompts_are_read_once_and_options_of_one_length_together(tmp_path):
    llm, task = make_llm(), labelled(("fish", "quay", "boats", "lids"), rows=6)
    calls = []
    handle = llm.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    metrics = ["first_token", "option_likelihood", "exact_match", "token_f1"]
    method = zero_shot(llm)
    rows = evaluate(method, [task], metrics, variants="first", batch_size=6)
    handle.remove()
    longest = max(len(prompt.ids) for prompt in method.prompts(task, task.test, task.training_renderers()[0]))
    assert [call["input_ids"].shape[1] for call in calls].count(longest) == 1
    lengths = {len(ids) for ids in task_options(method.tokenizer, task, task.training_renderers()[0]).ids}
    several = [call for call in calls if len(call["input_ids"]) > 6]
    assert len(several) <= len(lengths - {1})
    assert set(rows[0]["outputs"]) == {
        *("first_token", "first_token_among_options", "option_likelihood", "option_likelihood_per_byte", "generated")
    }


# ---- generated answers ----


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "opt", "gemma3"])
def test_a_generated_answer_is_that_of_transformers(name):
    llm, tokenizer = make_llm(name), byte_level_tokenizer()
    task = labelled(("fish", "a much longer answer than the others are"), rows=6)
    method = zero_shot(llm, tokenizer)
    rows = evaluate(method, [task], ["exact_match"], variants="first", batch_size=4)
    limit = max(len(encode_pair(tokenizer, "A:", option)[1]) for option in task.options)
    for row in rows:
        ids = torch.tensor([method.prompts(task, [task.test[row["example"]]], task.training_renderers()[0])[0].ids])
        out = llm.generate(ids, max_new_tokens=limit, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        text = tokenizer.decode([token for token in out.tolist() if token != tokenizer.eos_token_id])
        assert row["outputs"] == {"generated": text.split("\n")[0].strip()}
    assert len({row["outputs"]["generated"] for row in rows}) > 1


@pytest.mark.parametrize("positions", ["last", "answer", "all"])
def test_a_generated_answer_is_steered(positions):
    atv = make_atv(positions=positions, scale=2.0)
    task, read = labelled(("fish", "a longer answer"), rows=6), steered_by_hand(atv, positions)
    method = ATVMethod(atv)
    rows = evaluate(method, [task], ["exact_match"], variants="first", batch_size=4)
    limit = max(len(encode_pair(atv.tokenizer, "A:", option)[1]) for option in task.options)
    for row in rows:
        example, tokens = task.test[row["example"]], []
        prompt = method.prompts(task, [example], task.training_renderers()[0])[0].ids
        while len(tokens) < limit and 3 not in tokens and "\n" not in atv.tokenizer.decode(tokens):
            tokens.append(int(read(example, prompt, tokens).argmax()))
        text = atv.tokenizer.decode([token for token in tokens if token != 3])
        assert row["outputs"]["generated"] == text.split("\n")[0].strip()


def says(tokenizer, text, *, end=False):
    """A tiny LLM whose head is replaced: after a prompt it says the text, and token 9 for ever."""
    llm = make_llm(dtype=torch.float32)
    script = [*tokenizer(f" {text}")["input_ids"], *([3] if end else [])] + [9] * 400
    state = {"place": 0}
    forward = llm.forward

    def scripted(*args, **kwargs):
        output = forward(*args, **kwargs)
        new = kwargs["input_ids"].shape[1]
        state["place"] = 0 if new > 1 else state["place"] + 1
        output.logits = torch.zeros_like(output.logits)
        output.logits[:, -1, script[state["place"]]] = 9.0
        return output

    scripted.__signature__ = inspect.signature(forward)
    llm.forward = scripted
    return llm


@pytest.mark.parametrize(
    ("said", "end", "options", "generated"),
    [
        ("yes", True, ("yes", "a rather longer answer"), "yes"),  # stops at the end of the text
        ("yes\nand more", False, ("yes", "a rather longer answer"), "yes"),  # at a line break
        ("yes\nand", True, ("yes\nand", "no"), "yes\nand"),  # which an answer of the task has
        ("yes and on and on", False, ("yes", "no"), "yes and"),  # with the longest option and its end
    ],
)
def test_where_a_generated_answer_ends(said, end, options, generated):
    tokenizer = byte_level_tokenizer()
    task = labelled(options, rows=4)
    rows = evaluate(zero_shot(says(tokenizer, said, end=end), tokenizer), [task], ["exact_match"], variants="first")
    assert {row["outputs"]["generated"] for row in rows} == {generated}
    assert [row["scores"]["exact_match"] for row in rows] == [float(row["target"] == generated) for row in rows]


def test_spaces_before_punctuation_belong_to_an_answer():
    tokenizer = sentencepiece_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True  # then `decode` removes them
    llm = says(tokenizer, "yes . no")
    task = labelled(("yes . no", "no"), rows=4)
    for row in evaluate(zero_shot(llm, tokenizer), [task], ["exact_match"], variants="first"):
        assert row["outputs"]["generated"].startswith("yes . no")


def test_json_may_have_several_lines_and_a_code_block_and_other_metrics_judge_the_first_line():
    """A correct answer is one line, and an LLM that was not trained writes JSON as it likes."""
    tokenizer = byte_level_tokenizer()
    task = labelled(('{"a": 1}', '{"a": 2}'), rows=4)
    for said, first in (('```json\n{\n "a": 1\n}\n```', "```json"), ('{"a":\n1}', '{"a":'), ('{"a": 1}\n', '{"a": 1}')):
        llm = says(tokenizer, said, end=True)
        alone = evaluate(zero_shot(llm, tokenizer), [task], ["exact_match"], variants="first")
        assert {row["outputs"]["generated"] for row in alone} == {first}
        rows = evaluate(zero_shot(llm, tokenizer), [task], ["json", "exact_match"], variants="first")
        for row, other in zip(rows, alone, strict=True):
            right = float(row["target"] == '{"a": 1}')
            assert row["scores"] == {"json_valid": 1.0, "json_fields": right} | other["scores"]
            assert row["outputs"]["generated"] == said.strip()
    seen = []

    def own(_, text):
        seen.append(text)
        return 0.0

    evaluate(zero_shot(says(tokenizer, "yes\nand", end=True), tokenizer), [task], [own], variants="first")
    assert set(seen) == {"yes\nand"}


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("metric", ["option_likelihood", "exact_match", "first_token"])
def test_an_llm_whose_logits_are_not_finite_has_no_answer(metric, place):
    """An overflow in float16 is NaN for every token: the first option and the first token would be its answers."""
    llm, task, reads = make_llm(dtype=torch.float32), labelled(("yes it is", "yes it was"), rows=4), []

    def overflows(_, inputs, logits):
        reads.append(inputs)
        return logits.new_full(logits.shape, math.nan) if len(reads) > place else logits

    llm.lm_head.register_forward_hook(overflows)
    with refused("not finite", "float16", "scale"):
        evaluate(zero_shot(llm), [task], [metric], variants="first", batch_size=4)


def test_a_generated_answer_has_a_most_and_that_is_said(capsys, monkeypatch):
    monkeypatch.setattr("atv.progress._WARNED", set())
    monkeypatch.setattr("atv.evaluation.requests.MOST_TOKENS", 5)
    assert MOST_TOKENS == 256
    task, tokenizer = labelled(("yes", "a very much longer answer"), rows=4), byte_level_tokenizer()
    asked = Requests.of_task(make_llm(), tokenizer, task, task.training_renderers()[0], [ExactMatch()])
    assert (asked.limit, asked.read_after, asked.options) == (5, 4, None)
    assert "labels: its longest answer has" in capsys.readouterr().err


def test_where_an_answer_is_generated_nothing_is_done_for_each_option(monkeypatch):
    task = labelled(tuple(f"w{n}" for n in range(60)), rows=60)

    def never(*_):
        raise AssertionError("options were compared")

    monkeypatch.setattr("atv.evaluation.requests.task_options", never)
    monkeypatch.setattr("atv.evaluation.run.option_ids", never)
    llm, calls = make_llm(), []
    llm.register_forward_pre_hook(lambda *_: calls.append(1))
    evaluate(zero_shot(llm), [task], variants="first", batch_size=60)
    assert len(calls) <= 1 + 4  # the prompts, and at most one more for each further token of "w59" and its end


# ---- formulas ----


@pytest.mark.parametrize(
    ("text", "target", "value"),
    [
        ("the red fox", "a red fox", 1.0),  # articles do not count
        ("Red, fox!", "red fox", 1.0),
        ("red red fox", "red fox jumps", 2 * (2 / 3) * (2 / 3) / (2 / 3 + 2 / 3)),
        ("blue", "red", 0.0),
        ("", "red", 0.0),
        ("the", "a", 1.0),
        ("one two three four", "two", 2 * (1 / 4) * 1 / (1 / 4 + 1)),
    ],
)
def test_token_f1_by_hand(text, target, value):
    assert TokenF1()(Example("q", target), text) == {"token_f1": pytest.approx(value)}


@pytest.mark.parametrize(
    ("text", "target", "common"),
    [("police kill the gunman", "police killed the gunman", 3), ("the cat sat", "sat the cat", 2), ("a", "b", 0)],
)
def test_rouge_l_by_hand(text, target, common):
    pytest.importorskip("rouge_score")
    precision, recall = common / len(text.split()), common / len(target.split())
    expected = 2 * precision * recall / (precision + recall) if common else 0.0
    assert load_metric("rouge_l")(Example("q", target), text) == {"rouge_l": pytest.approx(expected)}


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [
        ("Привет, мир!", "привет мир", 1.0),
        ("好的东西", "好东西", 2 * 3 / 7),  # characters: all three of the answer's are there in order
        ("ของดี", "ของดี", 1.0),
        ("Größe", "Gr e", 0.0),
        ("नमस्ते दुनिया", "नमस्ते जी", 0.5),  # words with vowel signs
    ],
)
def test_rouge_l_of_any_script(text, target, expected):
    pytest.importorskip("rouge_score")
    assert load_metric("rouge_l")(Example("q", target), text) == {"rouge_l": pytest.approx(expected)}


@settings(max_examples=100, deadline=None)
@given(st.text("ab C1,.!_-\n", max_size=20), st.text("ab C1,.!_-\n", max_size=20))
def test_rouge_l_of_latin_letters_is_that_of_the_library(text, target):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    expected = scorer.score(target, text)["rougeL"].fmeasure
    assert load_metric("rouge_l")(Example("q", target), text) == {"rouge_l": expected}


def test_a_run_is_not_resumed_with_another_version_of_a_metric(tmp_path, monkeypatch):
    file, task = tmp_path / "judged.py", labelled(("yes", "no"), rows=4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("atv.evaluation.measure._load", lambda _: (make_llm(), byte_level_tokenizer()))
    for version, fails in ((1, True), (0, False)):
        file.write_text(f"def score(example, text):\n    return {version} / {int(not fails)}\n")
        sys.modules.pop("judged", None)
        importlib.invalidate_caches()
        how = {"variants": "first", "metrics": ["judged:score"]}
        with refused("raised ZeroDivisionError") if fails else refused("metrics"):
            measure("zero-shot", Frozen("tiny", dtype="float32"), [task], tmp_path / "out", **how)


def test_rouge_l_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setattr("atv.evaluation.metrics.find_spec", lambda _: None)
    with refused("rouge_l needs the package rouge-score", "pip install 'adaptive-task-vectors[rouge]'"):
        load_metric("rouge_l")


def test_exact_match_is_of_the_whole_answer_without_white_space_around_it():
    judge = ExactMatch()
    found = [judge(Example("q", "very good"), text)["exact_match"] for text in ("very good", " very good ", "very")]
    assert found == [1.0, 1.0, 0.0]


def test_likelihood_per_byte_counts_utf_8_and_ties_go_to_the_first():
    found = Likelihoods(["ab", "面面", "ab cd"], [-4.0, -6.0, -4.0])
    assert found.best() == "ab"
    assert found.best_per_byte() == "ab cd"  # -2, -1, -0.8
    assert Likelihoods(["ab", "ab cd"], [-4.0, -5.0], sums=False).best_per_byte() == "ab"


@pytest.mark.parametrize(
    ("text", "target", "valid", "fields"),
    [
        ('{"name": "Ada", "born": 1815}', '{"born": 1815.0, "name": "Ada"}', 1, 1),
        ('{"name": "Ada", "born": 1816, "more": 0}', '{"name": "Ada", "born": 1815}', 1, 1 / 2),
        ('{"a": [1, {"b": null}]}', '{"a": [1, {"b": null}], "c": 2, "d": "3"}', 1, 1 / 3),
        ('{"a": [1, {"b": 0}]}', '{"a": [1, {"b": null}]}', 1, 0),
        ('{"a": [true]}', '{"a": [1]}', 1, 0),  # in Python True == 1
        ('{"a": 9007199254740993}', '{"a": 9007199254740992}', 1, 0),  # equal as floats
        ('```json\n{"a": 1}\n```', '{"a": 1}', 1, 1),
        ("```\n[1, 2]\n```", "[1, 2]", 1, 1),
        ('Sure: {"a": 1}', '{"a": 1}', 0, 0),
        ('{"a": 1', '{"a": 1}', 0, 0),
        ('[{"a": 1}]', '{"a": 1}', 1, 0),
        ("{}", "{}", 1, 1),
        ("[]", "{}", 1, 0),
        ("null", "null", 1, 1),
        ("", "null", 0, 0),
        ("NaN", "1", 0, 0),  # Python's parser takes it
        ("[" * 100_000, "1", 0, 0),
        ('{"a": 1}', "free text", 1, None),
        ("free text", "free text", 0, None),
    ],
)
def test_json_is_compared_by_its_top_level_fields(text, target, valid, fields):
    found = load_metric("json")(Example("q", target), text)
    assert found == {"json_valid": valid, "json_fields": fields if fields is None else pytest.approx(fields)}


# ---- probabilities of options ----


def test_probabilities_are_the_softmax_of_log_likelihoods():
    values = torch.tensor([-4.5, -6.25, -4.0, -700.0], dtype=torch.float64)
    found = Likelihoods(["a", "b", "c", "d"], values.tolist()).probabilities()
    assert list(found) == ["a", "b", "c", "d"]
    assert list(found.values()) == pytest.approx(values.softmax(-1).tolist(), rel=1e-5)
    assert Likelihoods(["a", "b"], [-900.0, -math.inf]).probabilities() == {"a": 1, "b": 0}


def test_there_are_no_probabilities_of_many_options_or_where_none_has_a_score():
    for count, known in ((FEW_OPTIONS, True), (FEW_OPTIONS + 1, False)):
        found = Likelihoods([str(number) for number in range(count)], [-1.0] * count).probabilities()
        assert (found is not None) is known
    for values in ([-math.inf] * 2, [math.nan, -1.0], [-1.0, math.nan]):
        assert Likelihoods(["a", "b"], values).probabilities() is None


def test_rows_have_the_options_probabilities_and_the_query_where_a_score_is_0():
    llm, task = make_llm(), labelled(("yes", "no", "very"), rows=24)
    rows = evaluate(zero_shot(llm), [task], ["option_likelihood", "exact_match"], variants="first")
    assert {row["query"] == "" for row in rows} == {False}  # a random LLM generates no answer: exact_match is 0
    rows = evaluate(zero_shot(llm), [task], ["option_likelihood"], variants="first")
    assert len({row["scores"]["option_likelihood"] for row in rows}) == 2
    for row in rows:
        wrong = 0.0 in row["scores"].values()
        assert row["query"] == (task.test[row["example"]].input if wrong else "")
        assert list(row["probabilities"]) == list(task.options)
        assert math.fsum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        best = max(row["probabilities"], key=row["probabilities"].get)
        assert best == row["outputs"]["option_likelihood"]
    for metric in ("first_token", "exact_match"):
        assert {row["probabilities"] for row in evaluate(zero_shot(llm), [task], [metric], variants="first")} == {None}


# ---- defaults, and labels that begin alike ----


def test_few_options_are_scored_and_many_are_generated():
    assert default_metric(labelled(tuple(map(str, range(FEW_OPTIONS))), rows=FEW_OPTIONS)) == "option_likelihood"
    assert default_metric(labelled(tuple(map(str, range(FEW_OPTIONS + 1))), rows=FEW_OPTIONS)) == "exact_match"


MORE = {"sentences": tuple(f"The {a} is {b}" for a in ("lid", "quay", "boat") for b in range(50))[:140]}


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
@pytest.mark.parametrize("labels", [*LABELS, *MORE])
@pytest.mark.parametrize("seed", [1, 2])
def test_an_untrained_llm_scores_at_chance_or_is_refused(labels, make, seed):
    options = (LABELS | MORE)[labels]
    llm = make_llm(dtype=torch.float32)
    set_seed(seed)
    for weight in llm.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    task = labelled(options, rows=40)
    rows, refusal = [], ""
    try:
        rows = evaluate(zero_shot(llm, make()), [task], variants="first", batch_size=40)
    except ATVError as error:
        refusal = str(error)
    if not rows:
        assert "answers have the tokens of another" in refusal
        return
    for name in rows[0]["scores"]:
        found = sum(row["scores"][name] for row in rows) / len(rows)
        assert found <= task.majority() + 3 * math.sqrt(0.25 / len(rows))
        assert found < 0.9


# ---- one's own ----


def shortness(example, text):
    return 1 / (1 + len(text))


class Half:
    name, needs = "half", "loglikelihood"

    def __call__(self, example, output):
        return {"half": 0.5}


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "mine_metrics.py").write_text(
        "def starts(example, text):\n    return text[:1] == example.output[:1]\n"
        "def both(example, text):\n    return {'one': 1, 'none': None}\n"
        "def much(example, text):\n    return 7\n"
        "def fails(example, text):\n    raise KeyError('x')\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "mine_metrics"
    sys.modules.pop("mine_metrics", None)


def test_a_function_of_ones_own_is_a_metric_by_name_and_as_it_is(module, task):
    metrics = [f"{module}:starts", f"{module}:both", shortness, Half]
    rows = evaluate(zero_shot(make_llm()), [task], metrics, variants="first")
    for row in rows:
        said = row["outputs"]["generated"]
        starts = float(said[:1] == row["target"][:1])
        expected = {"starts": starts, "one": 1.0, "none": None, "shortness": 1 / (1 + len(said)), "half": 0.5}
        assert row["scores"] == expected


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("first_tokne", ("Unknown metric 'first_tokne'", "Did you mean 'first_token'", "package.module:function")),
        ("no_such_module:f", ("importing 'no_such_module' raised ModuleNotFoundError", "package.module:function")),
        ("{}:absent", ("is None", "expected a function")),
        ("{}:number", ("is 3", "expected a function")),
    ],
)
def test_a_metric_that_is_none_is_refused(module, name, parts):
    with refused(*parts):
        load_metric(name.format(module))


def test_what_a_function_returns_must_be_a_score(module, task):
    method = zero_shot(make_llm())
    with refused(f"{module}:much returned 7", "a number from 0 to 1"):
        evaluate(method, [task], [f"{module}:much"], variants="first")
    with refused(f"{module}:fails raised KeyError"):
        evaluate(method, [task], [f"{module}:fails"], variants="first")
    twice = UserMetric("twice", lambda example, text: {"exact_match": 1})
    with refused("Two metrics give the score exact_match"):
        evaluate(method, [task], ["exact_match", twice], variants="first")
    with refused("A metric is named twice: exact_match, exact_match"):
        evaluate(method, [task], ["exact_match", "exact_match"], variants="first")
    with refused("No metric is named"):
        evaluate(method, [task], [], variants="first")


# ---- methods that answer by themselves ----


class Knows(Method):
    name = "knows"

    def choose(self, task, examples, render):
        return [Choice("yes", {"yes": -0.1, "no": -3.0}, 7) for _ in examples]


class Says(Knows):
    name = "says"
    serves = frozenset({"generate"})

    def choose(self, task, examples, render):
        return [Choice("yes") for _ in examples]


def test_answers_without_the_llm_are_scored_by_the_same_metrics(task):
    metrics = ["first_token", "option_likelihood", "exact_match", "token_f1"]
    for row in evaluate(Knows(make_llm(), byte_level_tokenizer()), [task], metrics, variants="first"):
        assert row["scores"] == dict.fromkeys(row["scores"], float(row["target"] == "yes"))
        assert set(row["outputs"].values()) == {"yes"}
        assert row["prompt_tokens"] == 7
        yes, no = math.exp(-0.1), math.exp(-3.0)
        assert row["probabilities"] == pytest.approx({"yes": yes / (yes + no), "no": no / (yes + no)}, rel=1e-5)
        assert len(row["scores"]) == 6


class Foreign(Knows):
    """A classifier over the answers of another task."""

    name = "foreign"

    def choose(self, task, examples, render):
        return [Choice(f"shade {index}", {f"shade {index}": -0.1, "red": -3.0}) for index in range(len(examples))]


def test_a_classifier_that_knows_none_of_the_options_is_credited_with_none():
    task, found = toy_task(rows=90), {}
    for method in (Knows, Foreign):
        rows = evaluate(method(make_llm(), byte_level_tokenizer()), [task], ["first_token", "option_likelihood"])
        found[method.name] = [row | {"method": method.name, "llm": "l", "seed": 1, "run": "x"} for row in rows]
    for row in found["foreign"]:
        assert set(row["outputs"].values()) == {f"shade {row['example']}"}
        assert set(row["scores"].values()) == {0.0}
        assert row["probabilities"] is None
    rows = [row for some in found.values() for row in some]
    assert len({row["outputs"]["option_likelihood"] for row in rows}) > FEW_OPTIONS
    (table,) = classification_tables(rows)
    assert {line[1]: line[5:] for line in table.rows}["foreign"] == ["0.0", "0.0", "–"]
    assert "Confusion matrix: toy" in [table.title for table in classification_details(rows)]


def test_what_a_method_does_not_give_is_refused_before_anything_runs(task, tmp_path, monkeypatch):
    method = Says(make_llm(), byte_level_tokenizer())
    monkeypatch.setattr(Says, "choose", None)
    for metric, need in (("first_token", "next_token"), ("option_likelihood", "loglikelihood")):
        with refused(f"The metric {metric} needs {need}", "the method says does not give", "it gives generate"):
            evaluate(method, [task], [metric])
    monkeypatch.setitem(METHODS, "says", Says)
    with refused("The metric first_token needs next_token"):
        measure("says", Frozen("not loaded"), [task], tmp_path / "run", metrics=["first_token"])
    assert not (tmp_path / "run").exists()


def test_a_method_without_scores_is_matched_by_default(task):
    rows = evaluate(Says(make_llm(), byte_level_tokenizer()), [task], variants="first")
    assert [row["scores"] for row in rows] == [{"exact_match": float(row["target"] == "yes")} for row in rows]
    lies = type("Lies", (Says,), {"serves": Method.serves, "name": "lies"})
    with refused("has no scores of the options", "serves = {'generate'}"):
        evaluate(lies(make_llm(), byte_level_tokenizer()), [task], variants="first")


# ---- runs ----


def test_a_run_knows_its_metrics_and_is_not_continued_with_others(task, tmp_path, monkeypatch):
    llm = make_llm(dtype=torch.float32)
    monkeypatch.setattr(Frozen, "load", lambda _: (llm, byte_level_tokenizer()))
    many = dataclasses.replace(labelled(tuple(map(str, range(30))), rows=30), name="many")
    out = tmp_path / "run"
    assert measure("zero-shot", Frozen("tiny"), [task, many], out, variants="first")
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert settings["metrics"] == {"toy": ["option_likelihood"], "many": ["exact_match"]}
    assert not measure("zero-shot", Frozen("tiny"), [task, many], out, variants="first")
    with refused("metrics"):
        measure("zero-shot", Frozen("tiny"), [task, many], out, variants="first", metrics=["exact_match"])
    table = score_table(load_runs([out]))
    assert table.columns[4:7] == ["option_likelihood", "option_likelihood_per_byte", "exact_match"]
    cells = {line[0]: line[4:7] for line in table.rows}
    assert cells["toy"][2] == "–"
    assert cells["many"][:2] == ["–", "–"]
    assert all(cell.endswith("†") for cell in cells["mean of 2 tasks"])
    assert "exact_match was not asked for in toy: means are without these." in table.footnote


def test_an_interrupted_run_ends_with_the_rows_of_a_whole_one(tmp_path):
    llm, task = make_llm(), labelled(SOME, rows=9)
    metrics = ["option_likelihood", "exact_match"]
    whole = evaluate(zero_shot(llm), [task], metrics, RunWriter(tmp_path / "whole", {}), variants="first", batch_size=4)
    writer = RunWriter(tmp_path / "cut", {})
    lines = (tmp_path / "whole" / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut" / "predictions.jsonl").write_text("".join(lines[:3]))
    writer = RunWriter(tmp_path / "cut", {})
    again = evaluate(zero_shot(llm), [task], metrics, writer, variants="first", batch_size=4)
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in whole]
    assert metrics_of(zero_shot(llm), [task], metrics)["labels"][0].name == "option_likelihood"


# ---- summaries ----


def test_macro_f1_and_labels_are_those_of_scikit_learn():
    task = dataclasses.replace(toy_task(rows=60), name="t")
    rows = evaluate(zero_shot(make_llm()), [task], ["option_likelihood", "exact_match"])
    rows = [row | {"method": "zero-shot", "llm": "tiny", "seed": 1, "run": "x"} for row in rows]
    targets = [row["target"] for row in rows]
    for score, key in (("option_likelihood", "option_likelihood"), ("exact_match", "generated")):
        found = [row["outputs"][key] for row in rows]
        macro, *each = label_table(rows, score).rows
        expected = f1_score(targets, found, labels=["no", "yes"], average="macro", zero_division=0)
        assert macro[2:] == ["macro", macro[3], macro[4], f"{100 * expected:.1f}", str(len(rows))]
        for line, label in zip(each, ("no", "yes"), strict=True):
            of = {"labels": [label], "average": None, "zero_division": 0}
            numbers = [function(targets, found, **of)[0] for function in (precision_score, recall_score, f1_score)]
            assert line[2:] == [label, *(f"{100 * number:.1f}" for number in numbers), str(targets.count(label))]
    with refused("No row has an answer for the score rouge_l", "option_likelihood"):
        label_table(rows, "rouge_l")


def test_a_task_with_free_answers_has_no_labels():
    rows = [Example(f"q {n}", f"answer {n}") for n in range(30)]
    task = Task("free", ("{input}",), tuple(rows[:5]), tuple(rows[5:8]), tuple(rows[8:]))
    found = evaluate(zero_shot(make_llm()), [task], variants="first")
    assert label_table([row | {"method": "m", "llm": "l", "seed": 1, "run": "x"} for row in found]).rows == []
