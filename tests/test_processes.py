"""Several processes give the numbers of one: gloo on the CPU, forked from a server that has imported everything."""

import json
import os
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from conftest import byte_level_tokenizer, make_atv, make_llm, toy_task
from refusals import refused
from torch import multiprocessing
from training_runs import break_loss_after, weights

from atv.config import TrainConfig
from atv.errors import ATVError
from atv.evaluation.records import RunWriter, read_rows
from atv.evaluation.run import evaluate
from atv.methods import METHODS
from atv.training.loop import train


@pytest.fixture(scope="module", autouse=True)
def server():
    """Imports torch and transformers once; its processes start in no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server of Python 3.11 is not given sys.path
        multiprocessing.set_forkserver_preload(["test_processes"])
        forkserver.ensure_running()


def _in_process(rank, count, folder, work, arguments):
    torch.set_num_threads(1)
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {name: str(count) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=count)
    work(*arguments)
    torch.distributed.destroy_process_group()


def together(folder, work, *arguments, count=2):
    """Call `work` in `count` processes; an error in one ends all and is raised here."""
    (folder / "group").unlink(missing_ok=True)
    given = (count, folder, work, arguments)
    multiprocessing.start_processes(_in_process, given, nprocs=count, start_method="forkserver")


def trained(out, accumulation=1, nan_on=None, partly=False):
    """Nine training rows in batches of four: of the last batch all parts but the first hold nothing real."""
    atv = make_atv(scale=0.5, train_generator=not partly)
    if partly:
        atv.idle = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    for module in atv.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # its draws differ with the split
    config = TrainConfig(
        epochs=3, batch_size=4, gradient_accumulation_steps=accumulation, learning_rate=5e-3, templates_per_row=2
    )
    if nan_on is not None and os.environ["RANK"] == str(nan_on):
        break_loss_after(atv, 4)  # in the second epoch
    try:
        train(atv, [toy_task(rows=27)], out, config)
    except ATVError as error:
        Path(f"{out} {os.environ['RANK']}.txt").write_text(str(error))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    out = tmp_path_factory.mktemp("single")
    trained(out)
    return out


def check_same_training(out, single):
    records = [json.loads((folder / "train.json").read_text()) for folder in (out, single)]
    for key in ("loss", "eval_loss", "eval_accuracy", "epoch"):
        figures = [[entry[key] for entry in record["history"] if key in entry] for record in records]
        assert figures[0] == pytest.approx(figures[1], rel=1e-6), key
        assert len(figures[0]) >= 3
    assert records[0]["settings"] == records[1]["settings"]
    assert records[0]["finished"]
    assert not (out / "checkpoints").exists()
    expected = weights(single)
    for name, tensor in weights(out).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-7, msg=name)


def test_accumulated_gradients_are_those_of_the_whole_batch(single, tmp_path):
    trained(tmp_path / "out", accumulation=2)
    check_same_training(tmp_path / "out", single)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_what_one_trains(single, tmp_path, accumulation):
    together(tmp_path, trained, tmp_path / "out", accumulation)
    check_same_training(tmp_path / "out", single)


def test_a_frozen_generator_and_a_weight_that_nothing_uses_do_not_hold_processes_up(tmp_path):
    trained(tmp_path / "one", partly=True)
    together(tmp_path, trained, tmp_path / "two", 1, None, True)
    check_same_training(tmp_path / "two", tmp_path / "one")


def test_a_nan_in_one_process_stops_both_and_one_process_can_go_on(single, tmp_path):
    together(tmp_path, trained, tmp_path / "out", 1, 1)
    said = [Path(f"{tmp_path / 'out'} {rank}.txt").read_text() for rank in (0, 1)]
    assert "after step 4" in said[0]
    assert "holds the best epoch before that" in said[0]
    assert said[0] == said[1]
    assert (tmp_path / "out" / "adapter" / "atv_config.json").exists()
    trained(tmp_path / "out")
    check_same_training(tmp_path / "out", single)


@pytest.mark.parametrize(("processes", "accumulation"), [(3, 1), (1, 8), (2, 4)])
def test_a_batch_that_cannot_be_split_is_refused_with_the_numbers(processes, accumulation):
    config = TrainConfig(batch_size=4, gradient_accumulation_steps=accumulation)
    with refused(
        "batch_size is 4", f"{processes} processes x {accumulation}", f"multiple of {processes * accumulation}"
    ):
        config.rows_per_call(processes)


def test_training_refuses_a_batch_that_its_processes_cannot_share(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with refused("batch_size is 4"):
        train(make_atv(), [toy_task()], tmp_path / "out", TrainConfig(batch_size=4))
    assert not (tmp_path / "out").exists()


def evaluated(out):
    llm, tokenizer = make_llm(), byte_level_tokenizer()
    tasks = [toy_task("second", 33), toy_task("first", 33).drawn(None, None, 42, test=5)]
    run = RunWriter(out, {"tasks": [task.name for task in tasks]})
    evaluate(METHODS["zero-shot"].load(llm, tokenizer, None), tasks, ["first_token"], run, variants="all", batch_size=4)
    assert [answer(row) for row in run.rows] == [answer(row) for row in read_rows(out)]


def answer(row):
    return {key: value for key, value in row.items() if key != "seconds"}


def test_two_processes_give_the_rows_of_one_in_one_order_and_each_goes_on_from_the_other(tmp_path):
    evaluated(tmp_path / "one")
    rows = read_rows(tmp_path / "one")
    assert [row["task"] for row in rows] == ["second"] * 11 * 9 + ["first"] * 5 * 9
    assert [row["example"] for row in rows[:11]] == list(range(11))

    together(tmp_path, evaluated, tmp_path / "two")
    assert list(map(answer, read_rows(tmp_path / "two"))) == list(map(answer, rows))
    assert sorted(file.name for file in (tmp_path / "two").iterdir()) == ["predictions.jsonl", "run.json"]
    run = json.loads((tmp_path / "two" / "run.json").read_text())
    assert run["finished"]
    assert run["seconds"] == pytest.approx(sum(row["seconds"] for row in read_rows(tmp_path / "two")), abs=1e-3)

    # As two processes leave it that were killed, one of them in the middle of a line.
    lines = (tmp_path / "two" / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two" / "predictions.jsonl").write_text("".join(lines[0:40:2]))
    (tmp_path / "two" / "predictions-1.jsonl").write_text("".join(lines[1:60:2])[:-20])
    (tmp_path / "two" / "run.json").write_text(json.dumps(run | {"finished": False}))
    evaluated(tmp_path / "two")
    assert list(map(answer, read_rows(tmp_path / "two"))) == list(map(answer, rows))


def launched(*arguments):
    """`torchrun` with a free port, as a user types it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "atv"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.exhaustive  # the rows are compared above, and the next test starts torchrun too
def test_torchrun_evaluates_and_the_main_process_speaks(tmp_path):
    make_llm(dtype=torch.float32).save_pretrained(tmp_path / "llm")
    byte_level_tokenizer().save_pretrained(tmp_path / "llm")
    task = toy_task(rows=18)
    splits = {split: [row._asdict() for row in getattr(task, split)] for split in ("train", "valid", "test")}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "toy.json").write_text(json.dumps(splits))
    (tmp_path / "data" / "templates.json").write_text(json.dumps({"toy": list(task.templates)}))
    options = ["--llm", tmp_path / "llm", "--dtype", "float32", "--data", tmp_path / "data", "--variants", "first"]
    done = launched("eval", *options, "--batch-size", 2, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Run: ") == 1
    assert [row["example"] for row in read_rows(tmp_path / "run")] == list(range(6))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2


def test_what_is_wrong_in_all_processes_is_said_once(tmp_path):
    done = launched("train", "--config", tmp_path / "nothing.toml")
    assert done.returncode != 0
    assert done.stderr.count("atv: No file") == 1
