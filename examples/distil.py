"""Distil a system prompt with several methods and seeds, and print two tables (docs/examples.md).

`python -m examples.distil DATA SYSTEM --metric examples.prices:right --config prices.toml --out DIR`. After an
interruption, the same command resumes.
"""

import json
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, cast

import torch

from atv import ATVModel
from atv.cli import main as command_line
from atv.config import TrainConfig
from atv.data import Example
from atv.data.chat import Chat
from atv.evaluation.distil import recovered
from atv.evaluation.records import load_runs
from atv.report.statistics import paired, score_names

TIMED = 10
"""Queries whose answers are timed."""
NEW_TOKENS = 16
"""Tokens of each of these answers."""


def atv(*words: object) -> None:
    """Run a command of `atv` in this process."""
    sys.argv = ["atv", *map(str, words)]
    try:
        command_line()
    except SystemExit as stop:
        if stop.code:
            raise


def milliseconds(adapter: Path, queries: Sequence[str], system: str) -> dict[str, float]:
    """Return the CPU time of one answer with the system prompt, without it, and steered without it: medians."""
    model = ATVModel.from_pretrained(adapter)
    length: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}

    torch.set_num_threads(1)  # CPU time is the sum over threads

    def cpu_time(answer: Callable[[str], object]) -> float:
        taken = []
        for query in queries:
            start = time.process_time()
            answer(query)
            taken.append(1000 * (time.process_time() - start))
        return median(taken)

    def plain(query: str, system: str | None) -> object:
        prompt = Chat(system=system).prompt(model.tokenizer, Example(query, ""))
        return cast(Any, model.llm).generate(input_ids=torch.tensor([prompt.ids]), **length)

    return {
        "teacher": cpu_time(lambda query: plain(query, system)),
        "without": cpu_time(lambda query: plain(query, None)),
        "steered": cpu_time(lambda query: model.generate([query], **length)),
    }


def folder(method: str, seed: int) -> str:
    """Return the name of a run's folder."""
    return f"{method.replace(':', '-')}-{seed}"


def percent(values: Sequence[float]) -> str:
    """Return a mean over seeds and its sample standard deviation, in percent."""
    return f"{100 * fmean(values):.0f}%" + (f" ± {100 * stdev(values):.0f}" if len(values) > 1 else "")


def signed(value: float, low: float, high: float) -> str:
    """Return a difference and its interval, in points."""
    value, low, high = (f"{100 * each:+.0f}" for each in (value, low, high))
    return f"{value} ({low} to {high})"


def by_query(runs: Sequence[dict[str, Any]]) -> list[float]:
    """Return each query's divergence, the mean over seeds."""
    return [fmean(values) for values in zip(*(run["divergences"] for run in runs), strict=True)]


def table(out: Path, methods: Sequence[str], seeds: Sequence[int]) -> str:
    """Return what the runs in a folder recovered, in Markdown. The first method is compared with the others."""
    runs = {
        method: [json.loads((out / folder(method, seed) / "distil.json").read_text()) for seed in seeds]
        for method in methods
    }
    own = {method: by_query(found) for method, found in runs.items()}
    plain = runs[methods[0]][0]
    without, agreed = plain["divergences_without"], percent([plain["agreement_without"]])
    lines = [
        f"| | recovered | 95% interval | {methods[0]} minus this | nats per token | same next token |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| teacher | | | | 0 | 100% |",
        f"| without the prompt | 0% | | | {plain['divergence_without']:.3f} | {agreed} |",
    ]
    for method, found in runs.items():
        _, low, high = recovered(own[method], without)
        # first's share minus this one's, as the share that is gone: 1 - (without - this + first) / without
        beside = [w - o + f for w, o, f in zip(without, own[method], own[methods[0]], strict=True)]
        cells = [
            method,
            percent([run["recovered"] for run in found]),
            f"{100 * low:.0f} to {100 * high:.0f}",
            "" if method == methods[0] else signed(*recovered(beside, without)),
            f"{fmean(own[method]):.3f}",
            percent([run["agreement"] for run in found]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    took = json.loads((out / "milliseconds.json").read_text())
    return "\n".join(
        [
            *lines,
            "",
            f"Prompt tokens: {plain['prompt_tokens_teacher']:.0f}, without the system prompt "
            f"{plain['prompt_tokens']:.0f}. "
            f"CPU time of an answer of {NEW_TOKENS} tokens: {took['teacher']:.0f} ms with the prompt, "
            f"{took['without']:.0f} ms without it, {took['steered']:.0f} ms steered by {methods[0]}.",
        ]
    )


def table_of_scores(out: Path, methods: Sequence[str], seeds: Sequence[int]) -> str:
    """Return the scores of the answers, in Markdown. The first method is compared with the others on the same rows."""
    runs = {(method, seed): load_runs([out / folder(method, seed) / "eval"]) for method in methods for seed in seeds}
    rows = [row | {"method": method, "seed": seed} for (method, seed), found in runs.items() for row in found]
    others = {"teacher": load_runs([out / "teacher"]), "without the prompt": load_runs([out / "without"])}
    names = score_names(rows)
    beside = f"{methods[0]} minus this"
    lines = [
        f"| | {' | '.join(f'{name} | {beside}' for name in names)} |",
        f"| --- |{' ---: | ---: |' * len(names)}",
    ]

    def mean(found: Sequence[dict[str, Any]], name: str) -> float:
        return fmean(row["scores"][name] for row in found)

    for label, found in others.items():
        lines.append(f"| {label} | {' | '.join(f'{percent([mean(found, name)])} |' for name in names)} |")
    for method in methods:
        cells = [method]
        for name in names:
            apart = None if method == methods[0] else paired(rows, methods[0], method, name)
            cells.append(percent([mean(runs[method, seed], name) for seed in seeds]))
            cells.append("" if apart is None else signed(apart.value, apart.low, apart.high))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train and evaluate what is not finished, and print the table."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("system", type=Path, help="text file with the teacher's system prompt")
    parser.add_argument("--config", type=Path, required=True, help="options of atv train and settings of the methods")
    parser.add_argument("--metric", required=True, help="score of the answers, as for atv eval")
    parser.add_argument(
        "--methods",
        default="atv,atv:last,fixed,lora",
        help="separated by commas, `METHOD:POSITIONS` steers at these positions; the first one is timed",
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    methods, seeds = given.methods.split(","), range(TrainConfig.seed, TrainConfig.seed + given.seeds)
    system = given.system.read_text(encoding="utf-8").strip()
    evaluate = ("eval", "--data", given.data, "--metric", given.metric)
    train = ("train", "--data", given.data, "--teacher-system", given.system, "--config", given.config)
    for seed in seeds:
        for method in methods:
            out = given.out / folder(method, seed)
            if not (out / "distil.json").exists():
                name, _, positions = method.partition(":")
                steered = ("--positions", positions) if positions else ()
                atv(*train, "--method", name, *steered, "--seed", seed, "--out", out)
            atv(*evaluate, "--adapter", out, "--out", out / "eval")
    atv(*evaluate, "--out", given.out / "without")
    atv(*evaluate, "--system", system, "--out", given.out / "teacher")
    if not (times := given.out / "milliseconds.json").exists():
        queries = [row["prompt"] for row in json.loads(given.data.read_text(encoding="utf-8"))["test"][:TIMED]]
        times.write_text(json.dumps(milliseconds(given.out / folder(methods[0], seeds[0]), queries, system)))
    sys.stdout.write(f"{table(given.out, methods, seeds)}\n\n{table_of_scores(given.out, methods, seeds)}\n")


if __name__ == "__main__":
    main()
