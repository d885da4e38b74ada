"""Recorded rows to tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from atv.tasks import UNSEEN

_COLUMNS = (("accuracy", "correct", 100, 1), ("among options", "correct_among_options", 100, 1),
            ("tokens", "prompt_tokens", 1, 0), ("s/query", "seconds", 1, 4))  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A title, column names, and rows of text."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str
    text: int = 3
    """So many columns, the first, are words; the others are numbers."""
    bold: frozenset[tuple[int, int]] = frozenset()
    """Row and column of the cells that stand out."""
    plots: tuple[str, ...] = ()
    """What is drawn of it: names of `report.plots`."""
    runs: tuple[str, ...] = ()
    """Folders of the runs behind what is drawn."""


def accuracy_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Accuracy per task and method, with tokens and seconds per query: one line for each task and method.

    A task's accuracy is the mean over its variants and rows, and over runs if there are several of a method; a
    method's mean is that over its tasks, without those of the category Unseen, and a dash if it was not asked all of
    them. Methods on different LLMs stand on lines of their own.

    Args:
        rows: from `load_runs`, of any number of runs.
    """
    several = len({row["llm"] for row in rows}) > 1
    labels = [f"{row['method']}, {row['llm']}" if several else str(row["method"]) for row in rows]
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for label, row in zip(labels, rows, strict=True):
        cells.setdefault((row["task"], label), []).append(row)
    categories = {row["task"]: row["category"] for row in rows}
    methods, seen = list(dict.fromkeys(labels)), [task for task in categories if categories[task] != UNSEEN]
    lines = []
    for task, category in categories.items():
        for method in methods:
            found = cells.get((task, method), [])
            lines.append([task, category, method, str(len(found)), *_shown(_means(found))])
    for method in methods if len(seen) > 1 else ():
        parts = [_means(cells.get((task, method), [])) for task in seen]
        means = [fmean(values) if None not in values else None for values in zip(*parts, strict=True)]
        lines.append([f"mean of {len(seen)} tasks", "", method, "", *_shown(means)])
    note = (
        "Accuracy in percent: the most likely next token over the whole vocabulary is the first token of the answer; "
        "among options: the likeliest of the first tokens of the task's options is. Tokens: prompt tokens per query. "
        "Seconds per query include everything that the method does for it."
    )
    return Table("Accuracy per task", ["task", "category", "method", "rows", *(c[0] for c in _COLUMNS)], lines, note)


def number(cell: str) -> float | None:
    """What a cell says, without its spread; None if that is no number, as a dash."""
    try:
        return float(cell.split(" ± ")[0])
    except ValueError:
        return None


def _means(rows: Sequence[dict[str, Any]]) -> list[float | None]:
    return [factor * fmean(row[key] for row in rows) if rows else None for _, key, factor, _ in _COLUMNS]


def _shown(values: Sequence[float | None]) -> list[str]:
    """Missing is a dash: a mean over fewer tasks would flatter."""
    return [
        "–" if value is None else f"{value:.{digits}f}"
        for value, (_, _, _, digits) in zip(values, _COLUMNS, strict=True)
    ]
