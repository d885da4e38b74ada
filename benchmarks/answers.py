"""Evaluation by exact match with 500 different answers and with two: the cost of the number of answers.

All answers are three-digit numbers with the same number of tokens, so that equally much is generated for each. The
cache of encoded answers is cleared before each evaluation.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from atv.data import Example, Task, render
from atv.evaluation.run import evaluate
from atv.lm import scoring
from atv.methods import METHODS
from benchmarks.common import Figure, Record, in_turn, parse_options, ratio, times
from benchmarks.subjects import small_llm, small_name, tasks

MANY, FEW = "500 answers", "2 answers"
AMONG = "2 answers, likelihood of options"


def main(argv: Sequence[str] | None = None) -> Path:
    """Time whole evaluations of the same test inputs."""
    options = parse_options("benchmarks.answers", __doc__, argv)
    llm, tokenizer = small_llm(options)
    rows = 16 if options.tiny else 96
    many, few = (numbers(count, rows) for count in (500, 2))
    record = Record(
        "answers",
        "Evaluation with many answers",
        options,
        llm=small_name(options),
        **{"test rows": rows, "metric": "exact_match"},
    )
    sides = {
        MANY: partial(measured, llm, tokenizer, many, "exact_match"),
        FEW: partial(measured, llm, tokenizer, few, "exact_match"),
        AMONG: partial(measured, llm, tokenizer, few, "option_likelihood"),
    }
    seconds = in_turn("answers", sides, options)
    for name in sides:
        record.measure(f"{name}: a query", "ms", Figure.of(times(1000 / rows, seconds[name])))
    record.measure(f"{MANY} / {FEW}", "x", ratio(seconds[MANY], seconds[FEW]), ("at most", 1.5))
    record.plot(
        "A query",
        "",
        "ms",
        {name: {"": Figure.of(times(1000 / rows, seconds[name]))} for name in sides},
        kind="bars",
    )
    record.keep("", seconds)
    return record.finish()


def numbers(count: int, rows: int) -> Task:
    """The sentences of a built-in task, with `count` different numbers from 100 on as answers."""
    task = tasks()[0]
    inputs = [row.input for row in (*task.test, *task.train, *task.valid)]
    made = [Example(f"{inputs[n % len(inputs)]} ({n})", str(100 + n % count)) for n in range(rows + 504)]
    return replace(
        task, test=tuple(made[:rows]), valid=tuple(made[rows : rows + 4]), train=tuple(made[rows + 4 :]), options=()
    )


def measured(llm: nn.Module, tokenizer: Any, task: Task, metric: str) -> None:
    """One evaluation, with answers that are not cached."""
    for cached in (render._ending, render.following, render.answer_ids, scoring.encoded_options):
        cached.cache_clear()
    evaluate(METHODS["zero-shot"].load(llm, tokenizer, None), [task], [metric], variants="first")


if __name__ == "__main__":
    main()
