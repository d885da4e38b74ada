"""Prompt distillation: the teacher, the loss and what is recovered, each beside passes of the plain LLM."""

import copy
import hashlib
import itertools
import json
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from chat_templates import chat_tokenizer
from conftest import SIZES, make_generator
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from atv.cli import main
from atv.cli.loading import taught_queries
from atv.cli.options import Tasks
from atv.config import ATVConfig, TrainConfig
from atv.data import Example, Rendering, load_table
from atv.data.chat import Chat
from atv.data.render import Turn
from atv.data.table import Queries, load_queries
from atv.data.taught import divergence
from atv.evaluation.distil import agreement, distilled
from atv.lm.ends import end_ids
from atv.lm.identity import fingerprint, llm_digest
from atv.lm.load import load_llm
from atv.lm.teacher import LIKELIEST, ask_teacher, taught_task
from atv.methods.atv import ATVMethod
from atv.methods.fixed import FixedModel
from atv.methods.zero_shot import ZeroShot
from atv.model import ATVModel
from atv.training import batches
from atv.training.loop import train

SYSTEM = "You are the harbour office. Answer in one word."


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer("chatml")


@pytest.fixture(scope="module")
def llm(tokenizer):
    set_seed(1)
    sizes = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    return LlamaForCausalLM(LlamaConfig(**sizes)).double().eval()


def queries(count=30):
    every = [Example(f"Is the boat {number} in the harbour?", "") for number in range(count)]
    third = count // 3
    parts = (every[:third], every[third : 2 * third], every[2 * third :])
    return Queries("boats", dict(zip(("train", "valid", "test"), map(tuple, parts), strict=True)), {})


def taught(llm, tokenizer, **options):
    return taught_task(llm, tokenizer, queries(), Rendering(), **{"system": SYSTEM, "limit": 6} | options)


# ---- the divergence ----


@given(st.integers(1, 20), st.integers(0, 2**31))
def test_the_divergence_is_the_sum_over_the_likeliest_and_all_others_as_one(k, seed):
    draw = torch.Generator().manual_seed(seed)
    teacher, own = torch.randn(2, 20, generator=draw, dtype=torch.float64)
    p, q = teacher.softmax(-1), own.softmax(-1)
    best = p.topk(k)
    expected = sum(float(p[i] * (p[i] / q[i]).log()) for i in best.indices)
    rest_p, rest_q = float(1 - best.values.sum()), float(1 - q[best.indices].sum())
    expected += rest_p * torch.tensor(rest_p / rest_q).log().item() if k < 20 else 0
    found = divergence(own, best.indices, best.values.float())
    assert found.item() == pytest.approx(expected, abs=1e-4)
    assert divergence(teacher, best.indices, best.values.float()).item() == pytest.approx(0, abs=1e-4)


# ---- the teacher ----


def test_the_teacher_answers_and_is_as_sure_as_the_llm_with_the_system_prompt(llm, tokenizer):
    """Beside a loop that reads the whole prompt again for every token."""
    render, ends = Chat(system=SYSTEM), end_ids(llm, tokenizer)
    asked = [render.prompt(tokenizer, example).ids for example in queries().splits["test"]]
    for prompt, answer in zip(asked, ask_teacher(llm, tokenizer, asked, 6, batch_size=4), strict=True):
        ids = list(prompt)
        for step, token in enumerate(answer.ids):
            with torch.no_grad():
                shares = llm(torch.tensor([ids])).logits[0, -1].softmax(-1)
            best = shares.topk(LIKELIEST)
            assert token == best.indices[0] == answer.likeliest[step, 0]
            torch.testing.assert_close(answer.probabilities[step].double(), best.values, atol=1e-6, rtol=0)
            torch.testing.assert_close(shares[answer.likeliest[step]], best.values, atol=1e-6, rtol=0)
            ids.append(token)
        assert len(answer.ids) == 6 or answer.ids[-1] in ends
        assert not set(answer.ids[:-1]) & set(ends)


def test_the_same_teacher_is_asked_once(llm, tokenizer, tmp_path, monkeypatch):
    first = taught(llm, tokenizer, cache=tmp_path)
    monkeypatch.setattr("atv.lm.teacher.ask_teacher", lambda *_: pytest.fail("asked again"))
    again = taught(llm, tokenizer, cache=tmp_path)
    assert again == first
    for example, lesson in first.taught.items():
        assert again.taught[example].ids == lesson.ids
        assert torch.equal(again.taught[example].likeliest, lesson.likeliest)
        assert torch.equal(again.taught[example].probabilities, lesson.probabilities)
    monkeypatch.undo()
    other = taught(llm, tokenizer, cache=tmp_path, system="Say nothing.")
    assert {lesson.ids[0] for lesson in other.taught.values()} != {lesson.ids[0] for lesson in first.taught.values()}


def test_demonstrations_teach_too(llm, tokenizer):
    shots = [Example("Is the tide high?", "no"), Example("Is it dark?", "yes")]
    task = taught(llm, tokenizer, system=None, shots=shots)
    (example, lesson), *_ = task.taught.items()
    prompt = Chat().prompt(tokenizer, example, shots).ids
    with torch.no_grad():
        assert llm(torch.tensor([prompt])).logits[0, -1].argmax() == lesson.ids[0]
    assert task.prepared["teacher"]["shots"] == 2


def test_teachers_that_cannot_be_are_refused(llm, tokenizer, tmp_path):
    with refused("would read what the student reads"):
        taught(llm, tokenizer, system=None)
    own = (Turn("system", "Be brief."),)
    begun = {split: tuple(row._replace(turns=own) for row in rows) for split, rows in queries().splits.items()}
    with refused("would read what the student reads", "keeps its own"):  # the chat template would ignore the teacher's
        taught_task(llm, tokenizer, queries()._replace(splits=begun), Rendering(), system=SYSTEM)
    with refused("class_weights is 'balanced'"):
        how = TrainConfig(epochs=1, class_weights="balanced")
        train(FixedModel(llm, tokenizer=tokenizer), [taught(llm, tokenizer)], tmp_path / "out", how)
    with refused("The teacher's longest prompt has", "context is 2048"):
        taught(llm, tokenizer, limit=2048)


# ---- the student ----


def test_the_loss_of_a_step_is_the_divergence_from_the_teacher(llm, tokenizer, tmp_path):
    """Beside a pass of the plain LLM over prompt and answer: an untrained fixed vector changes nothing."""
    task = taught(llm, tokenizer)
    model = FixedModel(llm, tokenizer=tokenizer)
    config = TrainConfig(epochs=1, batch_size=100, learning_rate=0.0)
    record = train(model, [task], tmp_path / "out", config).record
    (loss,) = [entry["loss"] for entry in record["history"] if "loss" in entry]
    (valid,) = [entry["eval_loss"] for entry in record["history"] if "eval_loss" in entry]

    def away(example):
        lesson, prompt = task.taught[example], Chat().prompt(tokenizer, example).ids
        with torch.no_grad():
            logits = llm(torch.tensor([[*prompt, *lesson.ids]])).logits[0, len(prompt) - 1 : -1]
        return divergence(logits, lesson.likeliest, lesson.probabilities).mean().item()

    assert loss == pytest.approx(sum(map(away, task.train)) / len(task.train), rel=1e-3)
    assert valid == pytest.approx(sum(map(away, task.valid)) / len(task.valid), rel=1e-3)
    found = agreement(ZeroShot(llm, tokenizer), task, batch_size=4)
    assert found.divergences == pytest.approx([away(example) for example in task.test], rel=1e-4)


def test_rows_that_fill_the_last_batch_teach_nothing(llm, tokenizer, tmp_path):
    """Ten rows in batches of eight: the last one is filled, and three of its four parts hold nothing else."""
    task, found = taught(llm, tokenizer), {}
    for parts in (1, 4):
        model = FixedModel(llm, tokenizer=tokenizer)
        config = TrainConfig(epochs=2, batch_size=8, gradient_accumulation_steps=parts, learning_rate=0.01)
        history = train(model, [task], tmp_path / str(parts), config).record["history"]
        losses = [entry[key] for key in ("loss", "eval_loss") for entry in history if key in entry]
        found[parts] = losses, [p.detach().clone() for p in model.parameters()]
    assert found[4][0] == pytest.approx(found[1][0], rel=1e-5)
    for one, other in zip(found[1][1], found[4][1], strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-4)


@pytest.mark.parametrize("positions", [pytest.param("last", marks=pytest.mark.exhaustive), "answer"])
def test_a_student_learns_what_its_teacher_says(llm, tokenizer, tmp_path, positions):
    """Of the queries that it is trained on: answers of random weights have nothing in common to learn."""
    task, epochs = taught(llm, tokenizer), itertools.count()
    config = ATVConfig(positions=positions, gate=0.0, train_generator=False)
    model = ATVModel(llm, config, tokenizer=tokenizer, generator=make_generator(config))
    how = TrainConfig(epochs=60, batch_size=10, adaptive_dropout=0.0, state_dropout=0.0)
    train(model, [task], tmp_path / "out", how, metric=lambda _: next(epochs))  # the last epoch is kept
    found = distilled(ATVMethod(model), replace(task, train=task.test, test=task.train), llm)
    assert found["recovered"] > {"last": 0.03, "answer": 0.3}[positions]
    assert found["recovered_low"] <= found["recovered"] <= found["recovered_high"]
    assert found["recovered"] == pytest.approx(1 - sum(found["divergences"]) / sum(found["divergences_without"]))
    assert found["agreement"] > found["agreement_without"]
    assert found["prompt_tokens"] < found["prompt_tokens_teacher"] - 10


def test_what_is_recovered_is_counted_from_the_frozen_llm_and_not_from_the_methods_own(llm, tokenizer):
    """A fine-tuned copy is the method's LLM."""
    task, copied = taught(llm, tokenizer), copy.deepcopy(llm)
    with torch.no_grad():
        copied.lm_head.weight.mul_(0.5)
    found = distilled(ZeroShot(copied, tokenizer), task, llm)
    mean = {name: sum(agreement(ZeroShot(of, tokenizer), task).divergences) / len(task.test)
            for name, of in (("plain", llm), ("copy", copied))}  # fmt: skip
    assert found["divergence_without"] == pytest.approx(mean["plain"])
    assert found["recovered"] == pytest.approx(1 - mean["copy"] / mean["plain"])
    assert abs(found["recovered"]) > 0.01


def test_given_and_taught_answers_are_not_mixed(llm, tokenizer, tmp_path):
    task = taught(llm, tokenizer)
    some = dict(list(task.taught.items())[:5])
    with refused("Some rows have a teacher's answer and some a given one"):
        train(
            FixedModel(llm, tokenizer=tokenizer), [replace(task, taught=some)], tmp_path / "out", TrainConfig(epochs=1)
        )


# ---- the command ----


def test_queries_of_a_table_need_no_answers(tmp_path):
    file = tmp_path / "asked.jsonl"
    rows = [{"prompt": f"Is boat {number} here?"} for number in range(40)] + [
        {"prompt": "is BOAT 3 here?"},
        {"prompt": ""},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_queries(file)
    assert {split: len(rows) for split, rows in found.splits.items()} == {"train": 29, "valid": 3, "test": 8}
    assert found.prepared["dropped"] == {"with an empty cell": 1, "repeated": 1}
    drawn = found.drawn(5, None, 1)
    assert set(drawn.splits["train"]) < set(found.splits["train"])
    assert len(drawn.splits["train"]) == 5
    assert drawn.splits["valid"] == found.splits["valid"]


def test_the_student_is_asked_and_tested_as_the_table_is(tmp_path):
    """As `load_table` of the same file says: by its options of the chat template, on its test rows."""
    file, options = tmp_path / "t.jsonl", {"enable_thinking": False}
    rows = [
        {"prompt": f"Is boat {n} here?", "said": "yn"[n % 3 == 0], "chat_template_kwargs": options} for n in range(40)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"input": "prompt", "output": "said"}
    task = load_table(file, **columns)
    for shots in (0, 2):
        queries, student, shown = taught_queries(Tasks(data=str(file), **columns), shots, 1)
        assert student == task.renderer == Rendering(template_kwargs=json.dumps(options))
        assert [row.input for row in queries.splits["test"]] == [row.input for row in task.test]
        assert len(queries.splits["train"]) + len(shown) == len(task.train)
    given = '{"enable_thinking": true}'
    assert taught_queries(Tasks(data=str(file), chat_template_kwargs=given), 0, 1)[1].template_kwargs == given
    with refused("Give --input and --output together"):
        taught_queries(Tasks(data=str(file), output="said"), 0, 1)
    file.write_text(file.read_text() + json.dumps(rows[0] | {"prompt": "Which?", "chat_template_kwargs": {}}))
    with refused("rows with different chat_template_kwargs"):
        taught_queries(Tasks(data=str(file)), 0, 1)


def test_the_command_distils_a_system_prompt_from_queries_alone(tmp_path, monkeypatch, capsys, tokenizer):
    set_seed(1)
    sizes = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    (tmp_path / "system.txt").write_text(SYSTEM)
    rows = [{"prompt": f"Is boat {number} here?", "label": "yn"[number % 2]} for number in range(40)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*more):
        arguments = ["train", "--llm", tmp_path / "llm", "--dtype", "float32", "--data", tmp_path / "asked.jsonl"]
        arguments += ["--method", "fixed", "--epochs", 2, "--teacher-tokens", 4, "--out", tmp_path / "out", *more]
        monkeypatch.setattr(sys, "argv", ["atv", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    code, said, err = run("--teacher-system", tmp_path / "system.txt")
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "distil.json").read_text())
    assert f"fixed recovers {100 * found['recovered']:.0f}% of the teacher on 8 held-out queries" in said
    assert json.loads((tmp_path / "out" / "train.json").read_text())["data"]["asked"]["teacher"]["system"] == SYSTEM
    code, again, err = run("--teacher-system", tmp_path / "system.txt")
    assert (code, again) == (0, said), err
    assert "The teacher's answers are in" in err
    for more, named in (
        (["--teacher-system", tmp_path / "nothing.txt"], "nothing.txt cannot be read"),
        (
            ["--teacher-system", tmp_path / "system.txt", "--method", "encoder"],
            "method that a teacher can train 'encoder'",
        ),
        (["--teacher-system", tmp_path / "system.txt", "--task", "x"], "the queries of one table"),
        ([], "--teacher-tokens is for a teacher; add --teacher-system or --teacher-shots"),
        (["--teacher-shots", 99, "--input", "prompt", "--output", "label"], "--teacher-shots is 99"),
    ):
        code, _, err = run(*more)
        assert code == 2
        assert named in err, err
    code, said, err = run("--teacher-shots", 2, "--input", "prompt", "--output", "label", "--force")
    assert code == 0, err


def test_a_teacher_that_is_less_sure_of_the_same_answers_is_another_training(llm, tokenizer, tmp_path):
    task = taught(llm, tokenizer)
    doubtful = {
        example: lesson._replace(probabilities=lesson.probabilities / 2) for example, lesson in task.taught.items()
    }
    other, how = replace(task, taught=doubtful), TrainConfig(epochs=1)
    assert other == task
    first = train(FixedModel(llm, tokenizer=tokenizer), [task], tmp_path / "out", how).record
    with refused("other settings", "tasks.boats.teacher"):
        train(FixedModel(llm, tokenizer=tokenizer), [other], tmp_path / "out", how)
    assert train(FixedModel(llm, tokenizer=tokenizer), [task], tmp_path / "out", how).record == first
    second = train(FixedModel(llm, tokenizer=tokenizer), [other], tmp_path / "out", how, force=True).record
    assert second["best_eval_loss"] != first["best_eval_loss"]


def test_a_record_without_the_teachers_digest_is_accepted(llm, tokenizer, tmp_path):
    task, how = taught(llm, tokenizer), TrainConfig(epochs=1)
    train(FixedModel(llm, tokenizer=tokenizer), [task], tmp_path / "out", how)
    file = tmp_path / "out" / "train.json"
    record = json.loads(file.read_text())
    del record["settings"]["tasks"]["boats"]["teacher"]
    file.write_text(json.dumps(record))
    assert train(FixedModel(llm, tokenizer=tokenizer), [task], tmp_path / "out", how).record == record
    record["data"]["boats"] = {}  # not taught
    file.write_text(json.dumps(record))
    with refused("other settings", "tasks.boats.teacher"):
        train(FixedModel(llm, tokenizer=tokenizer), [task], tmp_path / "out", how)


def test_taught_rows_are_given_no_advice_that_is_refused(llm, tokenizer, tmp_path, capsys):
    task = taught(llm, tokenizer)
    once = task.train[0]._replace(output="once")
    rows = tuple(row._replace(output="often") for row in task.train[1:])
    lessons = dict(zip((once, *rows), task.taught.values(), strict=False))
    uneven = replace(task, train=(once, *rows), taught=task.taught | lessons, options=())
    train(FixedModel(llm, tokenizer=tokenizer), [uneven], tmp_path / "out", TrainConfig(epochs=1))
    assert "--class-weights" not in capsys.readouterr().err
    batches.note_imbalance(replace(uneven, taught={}))
    assert "--class-weights" in capsys.readouterr().err


def test_a_teacher_of_another_name_or_quantisation_is_asked_again(llm, tokenizer, tmp_path, monkeypatch):
    lessons, asked = list(taught(llm, tokenizer).taught.values()), []
    monkeypatch.setattr("atv.lm.teacher.ask_teacher", lambda llm, *_: asked.append(llm) or lessons)
    named = copy.deepcopy(llm)
    named.name_or_path = "another"
    revised = copy.deepcopy(llm)
    revised.config._commit_hash = "abc"
    quantised = copy.deepcopy(llm)
    quantised.config.quantization_config = {"quant_method": "awq"}
    for teacher in (llm, named, revised, quantised, llm, named):
        taught(teacher, tokenizer, cache=tmp_path)
    assert asked == [llm, named, revised, quantised]
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_the_digest_of_a_quantised_llm_covers_its_matrices(tmp_path):
    llm = LlamaForCausalLM(LlamaConfig(**SIZES | {"hidden_size": 64, "intermediate_size": 64}))
    llm.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        llm.model.layers[1].self_attn.v_proj.weight += torch.randn(64, 64)
    llm.save_pretrained(tmp_path / "other")
    how = {"dtype": "float32", "device": "cpu"}
    kinds = [(name, bits) for name in ("one", "other") for bits in ("8bit", "4bit")]
    digests = [llm_digest(load_llm(str(tmp_path / name), quantization=bits, **how)) for name, bits in kinds]
    assert len(set(digests)) == 4
    assert llm_digest(load_llm(str(tmp_path / "one"), quantization="4bit", **how)) == digests[1]
    plain = json.dumps(fingerprint(llm), sort_keys=True).encode()
    assert llm_digest(llm) == hashlib.sha256(plain).hexdigest()[:16]
