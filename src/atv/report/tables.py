"""Recorded rows to tables."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Table:
    """A title, column names, and rows of text."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str


def accuracy_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Accuracy per task and method, with tokens and seconds per query.

    Methods on different LLMs stand in columns of their own. A task's accuracy is the mean over its variants and rows,
    and over runs if there are several of a method; the average is the mean over tasks. Beside each stands the
    accuracy among the task's options.

    Args:
        rows: from `load_runs`, of any number of runs.
    """
    several = len({row["llm"] for row in rows}) > 1
    rows = [row | {"label": f"{row['method']}, {row['llm']}" if several else row["method"]} for row in rows]
    methods = list(dict.fromkeys(row["label"] for row in rows))
    tasks = list(dict.fromkeys((row["category"], row["task"]) for row in rows))
    cells: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        cells[row["task"], row["label"]].append(row)
    columns = ["task", "category", "rows"]
    for method in methods:
        columns += [method, f"{method} (options)"]
    for method in methods:
        columns += [f"tokens, {method}", f"s/query, {method}"]
    table = []
    for category, task in tasks:
        found = [cells[task, method] for method in methods]
        count = max(len(cell) for cell in found)
        table.append([task, category, str(count), *_scores(found), *_costs(found)])
    averages = [[cells[task, method] for _, task in tasks] for method in methods]
    table.append(["mean of tasks", "", "", *_mean_scores(averages), *_mean_costs(averages)])
    note = (
        "Accuracy in percent: the most likely next token over the whole vocabulary is the first token of the answer; "
        "(options): the likeliest among the task's options. Tokens: prompt tokens per query. Seconds per query "
        "include everything that the method does for it."
    )
    return Table("Accuracy per task", columns, table, note)


def _percent(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    return 100 * fmean(row[key] for row in rows) if rows else None


def _show(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean over tasks, only where every task has a value: a mean over fewer would flatter."""
    found = list(values)
    return None if any(value is None for value in found) else fmean(value for value in found if value is not None)


_SCORES = ("correct", "correct_among_options")
_COSTS = (("prompt_tokens", 0), ("seconds", 4))


def _scores(found: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    return [_show(_percent(cell, key)) for cell in found for key in _SCORES]


def _costs(found: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    return [
        _show(fmean(row[key] for row in cell) if cell else None, digits) for cell in found for key, digits in _COSTS
    ]


def _mean_scores(averages: Sequence[Sequence[Sequence[dict[str, Any]]]]) -> list[str]:
    return [_show(_mean(_percent(cell, key) for cell in cells)) for cells in averages for key in _SCORES]


def _mean_costs(averages: Sequence[Sequence[Sequence[dict[str, Any]]]]) -> list[str]:
    return [
        _show(_mean(fmean(row[key] for row in cell) if cell else None for cell in cells), digits)
        for cells in averages
        for key, digits in _COSTS
    ]


def markdown(table: Table) -> str:
    """A table as Markdown."""
    lines = [f"# {table.title}", "", "| " + " | ".join(table.columns) + " |"]
    lines.append("|" + "|".join(" --- " if index < 2 else " ---: " for index in range(len(table.columns))) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in table.rows]
    return "\n".join([*lines, "", table.note, ""])
