"""Tables from recorded rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from atv.data import UNSEEN
from atv.evaluation.metrics import SCORES
from atv.report.statistics import COSTS, score_names, scored

MARK = "†"
"""Mark after a number or a dash that the table's footnote explains."""
MISSING = "–"

_COSTS = (("tokens", "prompt_tokens", 0), ("s/query", "seconds", 4))
_UNDEFINED = {
    "first_token": "it is judged by an answer's first token, which does not tell all options of a task apart there",
}


@dataclass(frozen=True)
class Table:
    """A title, column names, and rows of text."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str
    text: int = 3
    """Number of leading text columns; the others are numbers."""
    bold: frozenset[tuple[int, int]] = frozenset()
    """Row and column of bold cells."""
    plots: tuple[str, ...] = ()
    """Its plots: names from `report.plots`."""
    runs: tuple[str, ...] = ()
    """Folders of the plotted runs."""
    footnote: str = ""
    """Explanation of the cells with `MARK`."""

    @property
    def notes(self) -> str:
        """The note, with the footnote if there is one."""
        return f"{self.note} {MARK}: {self.footnote}" if self.footnote else self.note


def undefined(rows: Iterable[Mapping[str, Any]], key: str) -> dict[str, None]:
    """The tasks for which a score is not defined, because it is None in some of their rows."""
    return dict.fromkeys(row["task"] for row in rows if key not in COSTS and row["scores"].get(key, 0) is None)


def footnote(rows: Sequence[Mapping[str, Any]], *keys: str) -> str:
    """Why scores are not defined for some tasks; empty if all are defined.

    Args:
        rows: from `load_runs`.
        keys: names of scores; by default all scores in the rows.
    """
    several = len({row["llm"] for row in rows}) > 1
    found = []
    for key in keys or score_names(rows):
        left = [{**row, "task": f"{row['task']} ({row['llm']})"} if several else row for row in rows]
        names = ", ".join(undefined(left, key))
        why = _UNDEFINED.get(key, "it is None for some of the rows there")
        found += [f"{key} is not defined in {names}: {why}, and means leave that out."] if names else []
    return " ".join(found)


def meaning(keys: Iterable[str]) -> str:
    """The meaning of scores, one sentence each."""
    return " ".join(f"{key}: {SCORES.get(key, 'a metric of your own')}." for key in keys)


def marked(cell: str) -> str:
    """A cell with the mark of the footnote, placed before a spread."""
    value, *spread = cell.split(" ± ")
    return " ± ".join([value + MARK, *spread])


def score_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Scores with tokens and seconds per query: one row per task and method.

    A task's score is the mean over its variants and rows, and over a method's runs if there are several. A method's
    mean is over its tasks without the category Unseen, or a dash if not all of them were evaluated. Each LLM has its
    own rows. An undefined score is a marked dash; a mean that leaves out a task is marked.

    Args:
        rows: from `load_runs`, from any number of runs.
    """
    labels = list(map(labeller(rows), rows))
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for label, row in zip(labels, rows, strict=True):
        cells.setdefault((row["task"], label), []).append(row)
    categories = {row["task"]: row["category"] for row in rows}
    methods, seen = list(dict.fromkeys(labels)), [task for task in categories if categories[task] != UNSEEN]
    names = score_names(rows)
    asked = {name: {row["task"] for row in scored(rows, name)} for name in names}
    lines = []
    for task, category in categories.items():
        for method in methods:
            found = cells.get((task, method), [])
            shown = [_mean([found], name) if task in asked[name] else MISSING for name in names]
            lines.append([task, category, method, str(len(found)), *shown, *_costs([found])])
    partial = [name for name in names if asked[name] & {*seen} and not asked[name] >= {*seen}]
    for method in methods if len(seen) > 1 else ():
        means = []
        for name in names:
            cell = _mean([cells.get((task, method), []) for task in seen if task in asked[name]], name)
            means.append(marked(cell) if name in partial and not cell.endswith(MARK) else cell)
        costs = _costs([cells.get((task, method), []) for task in seen])
        lines.append([f"mean of {len(seen)} tasks", "", method, "", *means, *costs])
    note = (
        f"Scores in percent. {meaning(names)} Tokens: prompt tokens per query. Seconds per query include everything "
        "that the method and the metrics do for it."
    )
    columns = ["task", "category", "method", "rows", *names, *(column for column, *_ in _COSTS)]
    some = [f"{name} was not asked for in {', '.join(t for t in seen if t not in asked[name])}" for name in partial]
    where = [f"{'; '.join(some)}: means are without these."] if some else []
    return Table("Scores per task", columns, lines, note, footnote=" ".join([footnote(rows), *where]).strip())


def prefix_table(rows: Sequence[dict[str, Any]]) -> Table | None:
    """Each task's score by answer prefix, one row per task and method; None if no task was asked with several.

    Args:
        rows: from `load_runs`. The score is the first one that is defined for the task.
    """
    names, label = score_names(rows), labeller(rows)
    cells: dict[tuple[str, str, str], dict[str | None, list[float]]] = {}
    prefixes: dict[str | None, None] = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        asked = [row for row in rows if row["task"] == task]
        name = next((name for name in names if scored(asked, name) and not undefined(asked, name)), None)
        if name is None or len({row["answer_prefix"] for row in asked}) < 2:
            continue
        for row in scored(asked, name):
            prefix = row["answer_prefix"]
            prefixes[prefix] = None
            cells.setdefault((task, label(row), name), {}).setdefault(prefix, []).append(row["scores"][name])
    if not cells:
        return None
    lines = []
    for key, found in cells.items():
        means = [f"{100 * fmean(found[prefix]):.1f}" if prefix in found else MISSING for prefix in prefixes]
        everything = [value for values in found.values() for value in values]
        lines.append([*key, *means, f"{100 * fmean(everything):.1f}"])
    note = (
        f"In percent. {meaning(dict.fromkeys(score for *_, score in cells))} A column is the mean over the rows, "
        "templates and seeds with that answer prefix, the last one over all of them. A method may be weak with a "
        "prefix that it was not trained on, which the mean over all hides."
    )
    columns = ["no prefix" if prefix is None else " ".join(prefix.split()) for prefix in prefixes]
    return Table("Scores by answer prefix", ["task", "method", "score", *columns, "all"], lines, note)


def labeller(rows: Iterable[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], str]:
    """Names of rows' methods; they include the LLM if the rows are of several."""
    several = len({row["llm"] for row in rows}) > 1
    return lambda row: f"{row['method']}, {row['llm']}" if several else str(row["method"])


def number(cell: str) -> float | None:
    """A cell's number without spread and mark; None if it is not a number, such as a dash."""
    try:
        return float(cell.split(" ± ")[0].rstrip(MARK))
    except ValueError:
        return None


def _mean(parts: Sequence[Sequence[dict[str, Any]]], name: str) -> str:
    """The mean over tasks of their rows' means, in percent.

    A dash if a task has no rows, since a mean over fewer tasks would be too optimistic; marked if it leaves out tasks
    for which the score is not defined.
    """
    known = [scored(rows, name) for rows in parts if not undefined(rows, name)]
    cell = MISSING
    if known and all(known):
        cell = f"{fmean(100 * fmean(row['scores'][name] for row in rows) for rows in known):.1f}"
    return marked(cell) if len(known) < len(parts) else cell


def _costs(parts: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Like `_mean`, for the rows' costs."""
    if not all(parts):
        return [MISSING] * len(_COSTS)
    return [f"{fmean(fmean(row[key] for row in rows) for rows in parts):.{digits}f}" for _, key, digits in _COSTS]
