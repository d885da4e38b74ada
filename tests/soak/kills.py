"""Kill `atv train`, `atv predict` and `atv paper reproduce` at random moments, start them again, and compare.

    PYTHONPATH=tests python tests/soak/kills.py --kills 20 --seed 0

Not part of the gate. Each command first runs once without a kill. Then it is killed (SIGKILL, the whole process group)
and started again with the same arguments, until it has been killed that often; whenever it ends by itself, what it
wrote is compared and it starts over in a new folder. The LLM is a tiny one with random weights, so that most of a
command's time is outside the LLM, where files are written.
"""

import argparse
import csv
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import byte_level_tokenizer, make_llm, toy_task

COMMAND = [sys.executable, "-m", "atv"]
SETTINGS = "[fixed]\nepochs = 6\n[atv]\nepochs = 6\n"
ROWS = 4000
"""Rows that `atv predict` answers."""


def main() -> int:
    """Kill, compare, print what was counted, and return 1 if anything was lost, twice or different."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", choices=("train", "predict", "reproduce"))
    chosen = options.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        jobs = make_world(world)
        for name, (arguments, result) in jobs.items():
            if chosen.only in (None, name):
                wrong += soak(name, world, arguments, result, chosen.kills, random.Random(f"{chosen.seed} {name}"))
    return int(wrong > 0)


def make_world(world: Path) -> dict[str, tuple[Callable[[Path], list[Any]], Callable[[Path], Any]]]:
    """Write LLM, data and an adapter; return each job's arguments and result, as functions of the output."""
    torch.manual_seed(0)
    make_llm(dtype=torch.float32).save_pretrained(world / "llm")
    byte_level_tokenizer().save_pretrained(world / "llm")
    shared = ["--llm", world / "llm", "--dtype", "float32"]
    task = toy_task(rows=480)
    written = {
        split: [{"input": row.input, "output": row.output} for row in getattr(task, split)]
        for split in ("train", "valid", "test")
    }
    (world / "data").mkdir()
    for name in ("one", "two"):
        named = {split: [row | {"input": f"{name} {row['input']}"} for row in rows] for split, rows in written.items()}
        (world / "data" / f"{name}.json").write_text(json.dumps(named | {"category": name}))
    (world / "data" / "templates.json").write_text(
        json.dumps({name: ["{input}\nyes or no?"] for name in ("one", "two")})
    )
    (world / "settings.toml").write_text(SETTINGS)
    with open(world / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([["input"], *([f"the harbour is {number}"] for number in range(ROWS))])
    train = [
        "train",
        *shared,
        "--data",
        world / "data",
        "--generator",
        "self",
        "--epochs",
        "30",
        "--positions",
        "answer",
    ]
    run([*train, "--out", world / "first"])
    reproduce = ["paper", "reproduce", *shared, "--data", world / "data", "--profile", "smoke"]
    reproduce += ["--config", world / "settings.toml"]
    for method in ("zero-shot", "bm25", "fixed", "lora"):
        reproduce += ["--method", method]
    predict = ["predict", world / "rows.csv", "--adapter", world / "first" / "adapter", "--task", "one"]
    return {
        "train": (lambda out: [*train, "--out", out], weights),
        "predict": (
            lambda out: [*predict, "--out", out.with_suffix(".csv")],
            lambda out: out.with_suffix(".csv").read_bytes(),
        ),
        "reproduce": (lambda out: [*reproduce, "--out", out], predictions),
    }


def weights(out: Path) -> dict[str, str]:
    """Return the digest of each file of weights."""
    files = sorted((out / "adapter").rglob("*.safetensors"))
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def predictions(out: Path) -> dict[str, list[Any]]:
    """Return the rows of each run without their seconds, in order, and the digests of the trained weights."""
    found: dict[str, list[Any]] = {}
    for file in sorted(out.rglob("predictions.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        found[str(file.relative_to(out))] = [{key: row[key] for key in row if key != "seconds"} for row in rows]
    for file in sorted(out.rglob("adapter/*.safetensors")):
        found[str(file.relative_to(out))] = [hashlib.sha256(file.read_bytes()).hexdigest()]
    return found


def start(arguments: Sequence[Any]) -> "subprocess.Popen[bytes]":
    """Start a command as the leader of a process group."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "start_new_session": True}
    return subprocess.Popen([*COMMAND, *map(str, arguments)], **silent)  # type: ignore[call-overload,no-any-return]


def run(arguments: Sequence[Any]) -> float:
    """Run a command to its end and return its seconds; exit if it fails."""
    began, process = time.monotonic(), start(arguments)
    _, said = process.communicate()
    if process.returncode:
        sys.exit(f"atv {' '.join(map(str, arguments))} ended with {process.returncode}:\n{said.decode()[-2000:]}")
    return time.monotonic() - began


def soak(
    name: str,
    world: Path,
    arguments: Callable[[Path], list[Any]],
    result: Callable[[Path], Any],
    kills: int,
    draw: random.Random,
) -> int:
    """Kill one command `kills` times; return how many of its results were wrong."""
    whole = world / f"{name}-whole"
    seconds = run(arguments(whole))
    expected = result(whole)
    if not expected:
        sys.exit(f"{name}: the run without a kill left no result to compare with")
    print(f"{name}: {seconds:.0f} s without a kill", flush=True)
    killed = right = wrong = failed = 0
    out, times_here, most, runs = world / f"{name}-0", 0, 0, 0
    while killed < kills or times_here:
        process = start(arguments(out))
        limit = draw.uniform(0, seconds) if killed < kills else None
        try:
            _, said = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            killed, times_here = killed + 1, times_here + 1
            continue
        if process.returncode:
            failed += 1
            print(
                f"{name}: ended with {process.returncode} after {times_here} kills:\n{said.decode()[-1000:]}",
                flush=True,
            )
        elif result(out) == expected:
            right += times_here > 0  # one that was not killed shows nothing
        else:
            wrong += 1
            print(f"{name}: {out} differs after {times_here} kills", flush=True)
        most, times_here, runs = max(most, times_here), 0, runs + 1
        out = world / f"{name}-{runs}"
    print(
        f"{name}: {killed} kills, up to {most} of one run; {right} results of killed runs equal to the one "
        f"without a kill, {wrong} different, {failed} refused to go on",
        flush=True,
    )
    return wrong + failed


if __name__ == "__main__":
    sys.exit(main())
