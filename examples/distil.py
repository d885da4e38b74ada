"""Distil a system prompt with several methods and seeds, and print one table (docs/distil.md).

`python -m examples.distil DATA SYSTEM --metric examples.prices:right --out DIR`. Options that it does not know are those
of `atv train`. After an interruption, the same command resumes.
"""

import json
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch

from atv import ATVModel
from atv.config import TrainConfig
from atv.data import Example
from atv.data.chat import Chat
from atv.evaluation.distil import recovered
from atv.evaluation.records import load_runs

TIMED = 10
"""Queries whose answers are timed."""
NEW_TOKENS = 16
"""Tokens of each of these answers."""


def atv(*words: object) -> None:
    """Run a command of `atv`."""
    subprocess.run([sys.executable, "-m", "atv", *map(str, words)], check=True)


def milliseconds(adapter: Path, queries: list[str], system: str) -> dict[str, float]:
    """Return the CPU time of one answer with the system prompt, and of one that is steered without it: medians."""
    model = ATVModel.from_pretrained(adapter)
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}

    def cpu_time(answer: Callable[[str], Any]) -> float:
        taken = []
        for query in queries:
            start = time.process_time()
            answer(query)
            taken.append(1000 * (time.process_time() - start))
        return median(taken)

    def plain(query: str, system: str | None) -> Any:
        prompt = Chat(system=system).prompt(model.tokenizer, Example(query, ""))
        return model.llm.generate(input_ids=torch.tensor([prompt.ids]), **length)

    return {
        "teacher": cpu_time(lambda query: plain(query, system)),
        "without": cpu_time(lambda query: plain(query, None)),
        "steered": cpu_time(lambda query: model.generate([query], **length)),
    }


def score(run: Path) -> str:
    """Return the mean of a run's first score, in percent."""
    return f"{100 * fmean(next(iter(row['scores'].values())) for row in load_runs([run])):.0f}%"


def percent(values: list[float]) -> str:
    """Return a mean over seeds and its sample standard deviation, in percent."""
    return f"{100 * fmean(values):.0f}" + (f" ± {100 * stdev(values):.0f}" if len(values) > 1 else "")


def by_query(runs: list[dict[str, Any]], key: str) -> list[float]:
    """Return the mean over seeds for each query."""
    return [fmean(values) for values in zip(*(run[key] for run in runs), strict=True)]


def shown(out: Path, methods: list[str], seeds: range, metric: str) -> str:
    """Return the table of what the runs in a folder found, in Markdown."""
    runs = {method: [json.loads((out / f"{method}-{seed}" / "distil.json").read_text()) for seed in seeds]
            for method in methods}  # fmt: skip
    plain, right = runs[methods[0]][0], {name: score(out / name) for name in ("teacher", "without")}
    without = plain["divergences_without"]
    lines = [
        f"| | recovered | 95% | {methods[0]} minus it, 95% | divergence | same token | {metric} |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| teacher | | | | 0 | 100% | {right['teacher']} |",
        f"| without the prompt | 0 | | | {plain['divergence_without']:.3f} | {100 * plain['agreement_without']:.0f}% | "
        f"{right['without']} |",
    ]
    first = by_query(runs[methods[0]], "divergences")
    for method in methods:
        own = by_query(runs[method], "divergences")
        _, low, high = recovered(own, without)
        # The difference of two recovered shares, as the share that is gone of a divergence: (own - first) / without.
        more, less, most = recovered([w - o + f for w, o, f in zip(without, own, first, strict=True)], without)
        beside = "" if method == methods[0] else f"{100 * more:+.0f}, {100 * less:+.0f} to {100 * most:+.0f}"
        scores = ", ".join(score(out / f"{method}-{seed}" / "eval") for seed in seeds)
        lines.append(
            f"| {method} | {percent([run['recovered'] for run in runs[method]])} | {100 * low:.0f} to {100 * high:.0f} | "
            f"{beside} | {fmean(own):.3f} | {percent([run['agreement'] for run in runs[method]])}% | {scores} |"
        )
    saved = plain["prompt_tokens_teacher"] - plain["prompt_tokens"]
    took = json.loads((out / "milliseconds.json").read_text())
    return "\n".join(
        [
            *lines,
            "",
            f"Prompt tokens: {plain['prompt_tokens_teacher']:.0f} with the prompt, {saved:.0f} fewer without it. "
            f"CPU time of an answer of {NEW_TOKENS} tokens: {took['teacher']:.0f} ms with the prompt, "
            f"{took['without']:.0f} ms without it, {took['steered']:.0f} ms steered by {methods[0]}.",
        ]
    )


def main() -> None:
    """Train and evaluate what is not finished, and print the table."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("system", type=Path)
    parser.add_argument("--metric", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default="atv,fixed,lora")
    parser.add_argument("--positions", default="answer")
    parser.add_argument("--seeds", type=int, default=1)
    given, training = parser.parse_known_args()
    methods, seeds = given.methods.split(","), range(TrainConfig.seed, TrainConfig.seed + given.seeds)
    system, data = given.system.read_text(encoding="utf-8").strip(), ("--data", given.data)
    asked = ("eval", *data, "--metric", given.metric)
    for seed in seeds:
        for method in methods:
            out = given.out / f"{method}-{seed}"
            own = () if method == "lora" else ("--positions", given.positions)
            more = ("--method", method, "--seed", seed, "--out", out, *own, *training)
            if not (out / "distil.json").exists():
                atv("train", *data, "--teacher-system", given.system, *more)
            atv(*asked, "--adapter", out, "--out", out / "eval")
    atv(*asked, "--out", given.out / "without")
    atv(*asked, "--system", system, "--out", given.out / "teacher")
    if not (times := given.out / "milliseconds.json").exists():
        queries = [row["prompt"] for row in json.loads(given.data.read_text(encoding="utf-8"))["test"][:TIMED]]
        times.write_text(json.dumps(milliseconds(given.out / f"{methods[0]}-{seeds[0]}", queries, system)))
    sys.stdout.write(shown(given.out, methods, seeds, given.metric) + "\n")


if __name__ == "__main__":
    main()
