"""Benchmarks: both sides compute the same thing, every script runs to its end, and the page is made of records."""

import importlib
import json
import os

import pytest
import torch
from conftest import make_atv
from rendering import row_of

from benchmarks import common, gpu_day, peft_methods, report, run_all
from benchmarks.reference import batch_loss, row_loss
from benchmarks.step import PARTS, floor_step, loss_of, own_optimizer, timed_step, train_step
from benchmarks.subjects import fill, rows_of, small_llm
from benchmarks.subjects import make_atv as subject

SCRIPTS = [module.__name__.rpartition(".")[2] for module in run_all.ON_CPU]


def several_rows(atv):
    """Prompts of several lengths, answers of one token and of many."""
    rows = [
        row_of("the harbour was quiet", ("the harbour was quiet\nA:", "Question: the harbour\nA:"), "yes"),
        row_of(
            "it leaks", ("Is it so? the kettle leaks and the lid sticks\nA:", "it leaks\nA:"), "negative or positive"
        ),
        row_of("one two three four", ("one two\nA:", "one two three four five six\nA:"), "no"),
    ]
    return [atv.encode_row(row) for row in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loops_have_the_librarys_loss_and_gradient(dtype):
    atv = make_atv(dtype=dtype)
    rows = several_rows(atv)
    assert len({len(answer) for row in rows for _, answer in row.pairs}) > 1
    weights = list(atv.parameters())
    by_row = sum(row_loss(atv, row) for row in rows) / len(rows)
    losses = {"library": loss_of(atv, rows), "row by row": by_row, "batched": batch_loss(atv, rows)}
    gradients = {name: torch.autograd.grad(loss, weights) for name, loss in losses.items()}
    for name in ("row by row", "batched"):  # both take logits as float32, as Hugging Face does
        torch.testing.assert_close(losses[name].to(dtype), losses["library"].to(dtype), rtol=1e-5, atol=1e-5)
        for reference, ours in zip(gradients[name], gradients["library"], strict=True):
            torch.testing.assert_close(reference, ours, rtol=1e-3, atol=1e-5)


def options(tmp_path, **changes):
    given = {"device": "cpu", "threads": 1, "rounds": 2, "tiny": True, "out": tmp_path, "command": "here"}
    return common.Options(**given | changes)


def test_prompts_have_exactly_the_tokens_that_were_asked_for(tmp_path):
    atv = subject(options(tmp_path), *small_llm(options(tmp_path)))
    for tokens in (5, 40, 3000):
        rows = rows_of(atv, 4, tokens)
        assert {len(prompt) for row in rows for prompt, _ in row.pairs} == {tokens}
        assert all(len(row.pairs) == 3 and row.query for row in rows)
    assert rows_of(atv, 4, 40) == rows_of(atv, 4, 40)


def test_the_parts_of_a_step_make_the_whole_and_leave_nothing_behind(tmp_path):
    atv = subject(options(tmp_path), *small_llm(options(tmp_path)))
    rows = rows_of(atv, 2, 20)
    store, optimizer = fill(atv, rows), own_optimizer(atv)
    parts = timed_step(atv, lambda: loss_of(atv, rows), optimizer, "cpu")
    assert set(parts) == {*PARTS, "whole"}
    assert all(seconds > 0 for seconds in parts.values())
    assert sum(parts[part] for part in PARTS) == pytest.approx(parts["whole"], rel=1e-6)
    assert atv.read_prefix == store.read
    assert not atv.generator._forward_hooks
    assert not atv.expansion._forward_pre_hooks


@pytest.mark.parametrize("generator", ["minilm", "gpt2"])
@pytest.mark.parametrize("tiny", [True, False])
def test_the_generator_of_a_training_step_is_trained_at_any_size(tmp_path, generator, tiny):
    llm = small_llm(options(tmp_path))
    made = subject(options(tmp_path, tiny=tiny), *llm, generator).generator
    assert made.trainable
    assert all(p.requires_grad for p in made.parameters())


@pytest.mark.parametrize("step", [floor_step, train_step])
def test_a_step_updates_the_generator_and_never_the_llm(tmp_path, step):
    atv = subject(options(tmp_path), *small_llm(options(tmp_path)))
    before, frozen = [[p.clone() for p in module.parameters()] for module in (atv.generator, atv.llm)]
    optimizer = own_optimizer(atv)
    step(atv, rows_of(atv, 2, 20), optimizer)
    assert sum(not torch.equal(p, was) for p, was in zip(atv.generator.parameters(), before, strict=True)) > 10
    assert all(torch.equal(p, was) for p, was in zip(atv.llm.parameters(), frozen, strict=True))
    assert all(p.grad is None for p in atv.generator.parameters())
    assert {id(p) for p in atv.parameters()} == set(map(id, optimizer.state))  # the expansion's are updated too


def test_sides_take_turns_and_quick_ones_are_repeated(tmp_path):
    calls = []
    sides = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = common.in_turn("turns", sides, options(tmp_path, rounds=3))
    assert calls == list("ab" * 4)  # the first round warms up
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_figures():
    assert common.Figure.of([3.0, 1.0, 2.0]) == common.Figure(2.0, 1.0, 3.0)
    assert common.rate(8, [4.0, 2.0, 1.0]) == common.Figure(4.0, 2.0, 8.0)
    assert common.ratio([4.0, 9.0, 2.0], [2.0, 3.0, 1.0]) == common.Figure(2.0, 2.0, 3.0)


def test_targets(tmp_path, capsys):
    record = common.Record("some", "Some", options(tmp_path))
    record.measure("enough", "x", 12.0, ("at least", 12))
    record.measure("too much", "x", 1.3, ("at most", 1.25))
    record.measure("no target", "ms", common.Figure(2.0, 1.0, 3.0))
    written = json.loads(record.finish().read_text())
    assert [line.get("reached") for line in written["measures"]] == [True, False, None]
    assert {"commit", "versions", "hardware", "command", "date", "seed", "sizes"} <= set(written)
    shown = capsys.readouterr().out
    assert "at least 12: reached" in shown
    assert "at most 1.25: missed" in shown


def quick(tmp_path):
    return ["--tiny", "--rounds", "1", "--threads", "1", "--out", str(tmp_path)]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.exhaustive] if name in ("peft_methods", "prompt_length") else [])
        for name in (*SCRIPTS, "to_accuracy", "gpu_training")
    ],
)
def test_every_script_runs_to_its_end_and_its_record_is_shown(name, tmp_path):
    written = importlib.import_module(f"benchmarks.{name}").main(quick(tmp_path))
    record = json.loads(written.read_text())
    assert record["tiny"]
    assert record["measures"]
    assert record["panels"]
    assert all(line["low"] <= line["high"] for line in record["measures"])
    page = tmp_path / "page.md"
    page.write_text(f"Before.\n\n<!-- table:{name} -->\n<!-- end -->\n\nAfter.\n")
    for _ in range(2):  # twice: its own output is replaced
        report.main(["--results", str(tmp_path), "--page", str(page)])
    text = page.read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("\n\nAfter.\n")
    assert text.count("| what | measured |") == 1
    assert "Tiny random models" in text
    assert (tmp_path / "page" / f"{name}.svg").read_text().startswith("<?xml")


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the kernel does not note peak memory")
def test_peak_memory_is_seen_after_it_was_given_back(tmp_path):
    before = peft_methods._begin(options(tmp_path))
    block = torch.ones(30_000_000)
    del block
    assert 0.9 < (peft_methods._peak(options(tmp_path)) - before) / 120e6 < 1.5


def test_the_memory_of_one_side_is_printed_as_json(tmp_path, capsys):
    assert peft_methods.main([*quick(tmp_path), "--memory-of", "LoRA"]) is None
    assert set(json.loads(capsys.readouterr().out)) in ({"peak", "own weights"}, set())


def test_a_former_profile_is_shown_beside_the_new_one(tmp_path):
    profile = importlib.import_module("benchmarks.profile_step")
    profile.main(quick(tmp_path / "before"))
    written = json.loads(profile.main([*quick(tmp_path), "--before", str(tmp_path / "before")]).read_text())
    compared = [line["what"] for line in written["measures"] if line["what"].endswith("before / now")]
    assert len(compared) == 3 * (len(PARTS) + 1)


def test_a_missing_gpu_is_said(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="torch finds no GPU here"):
            importlib.import_module("benchmarks.training").main([*quick(tmp_path), "--device", "cuda"])


def test_the_page_has_a_place_for_every_benchmark():
    places = set(report.BLOCK.findall(report.PAGE.read_text(encoding="utf-8")))
    assert places == {
        *SCRIPTS,
        "to_accuracy",
        "serving_llamacpp",
        "serving_vllm",
        "gpu_equality-cuda",
        "inference-cuda",
        "gpu_training-cuda",
    }


def test_the_day_on_a_gpu_runs_to_its_end_and_finds_the_devices_equal(tmp_path):
    files = gpu_day.main(quick(tmp_path))
    assert [file.stem for file in files] == ["gpu_equality", "inference", "gpu_training"]
    equal = json.loads(files[0].read_text())["measures"]
    assert [line["what"].split(":")[0] for line in equal] == ["loss", "gradient", "logits"]
    assert all(line["reached"] for line in equal)


def test_the_day_on_a_gpu_needs_one(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_day.main(["--out", str(tmp_path)])
    assert "--device cuda" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
