"""Seconds until a training reaches the validation accuracy that other methods end with, on the same rows.

Every method is trained with its own defaults. Seconds are of a whole training on its own: they include reading the
prompts and validating after each epoch, and not loading the LLM. Each round has another seed.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from atv.config import SELF
from atv.data import Task, load_tasks
from atv.methods import METHODS
from atv.methods.settings import method_settings
from atv.progress import bar
from benchmarks.common import SEED, Figure, Record, options_of, parser, ratio
from benchmarks.subjects import small_llm, small_name
from examples import tickets

OTHERS = {"lora": 8, "full": 15, "encoder": None, "probe": None}
"""Methods whose accuracy is to be reached, and how many times sooner."""
SST2 = "glue_sst2"


class Curve(NamedTuple):
    """A training's validation accuracies."""

    points: list[tuple[float, float]]
    """Seconds since the training began, accuracy."""
    final: float
    """Of the epoch that is kept."""
    whole: float
    """Seconds of the training."""

    def until(self, accuracy: float) -> float:
        """Seconds until an accuracy is reached; infinite if it is not."""
        return next((seconds for seconds, found in self.points if found >= accuracy), math.inf)


def main(argv: Sequence[str] | None = None) -> Path:
    """Train all methods on each task, and compare when they got where."""
    parse = parser("benchmarks.to_accuracy", __doc__)
    parse.add_argument("--data", type=Path, help=f"folder with {SST2}.json, which is measured too")
    parse.add_argument("--train-rows", type=int, default=400)
    parse.add_argument("--valid-rows", type=int, default=300)
    parse.add_argument("--method", action="append", choices=tuple(OTHERS), help="beside the ATV; all by default")
    given = parse.parse_args(argv)
    options = options_of(given, "benchmarks.to_accuracy", argv)
    rows = (16, 8) if options.tiny else (given.train_rows, given.valid_rows)
    names = ["atv", *(given.method or (("lora", "full") if options.tiny else OTHERS))]
    changed: dict[str, dict[str, Any]] = {"all": {"epochs": 2}, "atv": {"generator": SELF}} if options.tiny else {}
    llm, tokenizer = small_llm(options)
    with TemporaryDirectory() as folder:
        tasks = _tasks(Path(folder), given.data, options.tiny)
        record = Record(
            "to_accuracy",
            "Seconds until an accuracy is reached",
            options,
            llm=small_name(options),
            **{
                f"rows of {task.name}": f"{min(rows[0], len(task.train))}, {min(rows[1], len(task.valid))}"
                for task in tasks
            },
        )
        with bar("train", len(tasks) * options.rounds * len(names)) as shown:
            for task in tasks:
                found: dict[str, list[Curve]] = {name: [] for name in names}
                for seed in range(SEED, SEED + options.rounds):
                    for name, curves in found.items():
                        shown.describe(f"{task.name}: {name}")
                        out = Path(folder) / f"{task.name}-{name}-{seed}"
                        curves.append(
                            _train(name, llm, tokenizer, task.drawn(rows[0], rows[1], seed), out, seed, changed)
                        )
                        shown.advance()
                _measure(record, task.name, found)
    return record.finish()


def _tasks(folder: Path, data: Path | None, tiny: bool) -> list[Task]:
    """The built-in topics of sentences, and tickets with twelve labels, which the LLM is asked in its chat template."""
    tasks = load_tasks(["topic"])
    if not tiny:
        file = folder / "tickets.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in tickets.rows()))
        tasks += load_tasks(data=file)
    return tasks + (load_tasks([SST2], data) if data is not None else [])


def _train(
    name: str, llm: Any, tokenizer: Any, task: Task, out: Path, seed: int, changed: Mapping[str, dict[str, Any]]
) -> Curve:
    """Train a method with a store of its own."""
    METHODS[name].fit(llm, tokenizer, [task], out, *method_settings(name, [changed], seed))
    record = json.loads((out / "train.json").read_text())
    if "history" not in record:  # learned without epochs
        final = float(record["chosen"]["valid_accuracy"])
        return Curve([(record["seconds"], final)], final, record["seconds"])
    points = [(entry["seconds"], entry["eval_accuracy"]) for entry in record["history"] if "eval_accuracy" in entry]
    return Curve(points, record["best_eval_accuracy"], record["seconds"])


def _measure(record: Record, task: str, found: Mapping[str, list[Curve]]) -> None:
    """Record a task's accuracies, times and ratios."""
    for name, curves in found.items():
        record.measure(f"{task}: {name}, validation accuracy", "%", Figure.of([100 * one.final for one in curves]))
        record.measure(f"{task}: {name}, whole training", "s", Figure.of([one.whole for one in curves]))
    for name, curves in found.items():
        if name == "atv":
            continue
        pairs = [(one.until(one.final), ours.until(one.final)) for one, ours in zip(curves, found["atv"], strict=True)]
        reached = [pair for pair in pairs if math.isfinite(pair[1])]
        what = f"{task}: rounds in which the ATV reaches the accuracy of {name}"
        record.measure(what, f"of {len(pairs)}", len(reached))
        if reached:
            theirs, ours = zip(*reached, strict=True)
            target = OTHERS[name]
            aim = None if target is None else ("at least", float(target))
            record.measure(f"{task}: seconds to it, {name} / ATV", "x", ratio(theirs, ours), aim)
            record.keep(f"{task}, until the accuracy of {name}: ", {name: list(theirs), "atv": list(ours)})
    first = {
        name: {seconds: Figure.of([100 * accuracy]) for seconds, accuracy in curves[0].points}
        for name, curves in found.items()
    }
    record.plot(task, "seconds", "validation accuracy", first, kind="curves")


if __name__ == "__main__":
    main()
