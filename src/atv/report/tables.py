"""Recorded rows to tables."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from atv.data import UNSEEN

MARK = "†"
"""Behind a number or a dash that a table's footnote explains."""
MISSING = "–"

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
    footnote: str = ""
    """What `MARK` says in the cells that have it."""

    @property
    def notes(self) -> str:
        """The note with the footnote, if there is one."""
        return f"{self.note} {MARK}: {self.footnote}" if self.footnote else self.note


def undefined(rows: Iterable[Mapping[str, Any]], key: str = "correct") -> dict[str, None]:
    """The tasks for which the accuracy `key` is not defined, since it is None in some of the rows."""
    return dict.fromkeys(row["task"] for row in rows if row[key] is None)


def footnote(rows: Sequence[Mapping[str, Any]]) -> str:
    """Why the accuracy over the whole vocabulary is not defined for some tasks of recorded rows; empty if it is."""
    several = len({row["llm"] for row in rows}) > 1
    left = [{**row, "task": f"{row['task']} ({row['llm']})"} if several else row for row in rows]
    names = ", ".join(undefined(left))
    return names and (
        "accuracy over the whole vocabulary is of an answer's first token, which does not tell all options of a task "
        f"apart in {names}: it is not defined there, and means leave that out."
    )


def marked(cell: str) -> str:
    """A cell with the mark of the footnote, which stands before a spread."""
    value, *spread = cell.split(" ± ")
    return " ± ".join([value + MARK, *spread])


def accuracy_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Accuracy per task and method, with tokens and seconds per query: one line for each task and method.

    A task's accuracy is the mean over its variants and rows, and over runs if there are several of a method; a
    method's mean is that over its tasks, without those of the category Unseen, and a dash if it was not asked all of
    them. Methods on different LLMs stand on lines of their own. Where accuracy over the whole vocabulary is not defined
    a marked dash stands, and a mean without that task is marked.

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
            lines.append([task, category, method, str(len(found)), *_shown([found])])
    for method in methods if len(seen) > 1 else ():
        parts = [cells.get((task, method), []) for task in seen]
        lines.append([f"mean of {len(seen)} tasks", "", method, "", *_shown(parts)])
    note = (
        "Accuracy in percent: the most likely next token over the whole vocabulary is the first token of the answer; "
        "among options: the likeliest of the task's options, by their tokens up to where they differ, is the answer. "
        "Tokens: prompt tokens per query. Seconds per query include everything that the method does for it."
    )
    columns = ["task", "category", "method", "rows", *(column[0] for column in _COLUMNS)]
    return Table("Accuracy per task", columns, lines, note, footnote=footnote(rows))


def number(cell: str) -> float | None:
    """What a cell says, without its spread and mark; None if that is no number, as a dash."""
    try:
        return float(cell.split(" ± ")[0].rstrip(MARK))
    except ValueError:
        return None


def _shown(parts: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """The mean over tasks of the means of their rows, in every column.

    A dash if a task has no rows, since a mean over fewer tasks would flatter; marked without those for which it is not
    defined.
    """
    cells = []
    for _, key, factor, digits in _COLUMNS:
        known = [rows for rows in parts if not undefined(rows, key)]
        cell = MISSING
        if known and all(known):
            cell = f"{fmean(factor * fmean(row[key] for row in rows) for rows in known):.{digits}f}"
        cells.append(marked(cell) if len(known) < len(parts) else cell)
    return cells
