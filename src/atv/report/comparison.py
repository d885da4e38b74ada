"""Comparison of methods: scores by category and task, their averages, and paired differences from ATV."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from atv.data import UNSEEN
from atv.errors import ATVError
from atv.methods import METHODS
from atv.report.statistics import RESAMPLES, Row, Score, Scores, paired, score_names, scored, scores, tasks_of
from atv.report.tables import MISSING, Table, footnote, marked, meaning, prefix_table, score_table, undefined

ATV = "atv"
PUBLISHED = "paper, "
"""Prefix of rows with published numbers."""
PAPER_SCORE = "first_token"
"""The score of published numbers."""
AVERAGE = "Avg"
"""Column of the mean over categories or tasks."""
COSTS = {"tokens": ("prompt_tokens", 0), "s/query": ("seconds", 4)}  # what is averaged, number of decimals

_SPREAD = (
    "In percent, computed for each seed; shown: mean over seeds ± sample standard deviation (none with one seed). "
    "Bold: the best of a column, except the paper's rows. A dash: not all of it was evaluated."
)
_COST = (
    "Prompt tokens and seconds per query are averaged in the same way; seconds include everything that the method does "
    "for a query."
)

Line = Mapping[str, Score | None]
"""A method's scores by column name."""


class Published(Protocol):
    """Published numbers for the same tasks, to compare with recorded rows."""

    @property
    def source(self) -> str:
        """Where the numbers were published."""

    @property
    def order(self) -> Sequence[str]:
        """Order of categories and tasks in the published tables."""

    def lines(self, part: str, methods: Iterable[str], tasks: Mapping[str, str]) -> dict[str, Line]:
        """Rows for these methods, with names beginning with `PUBLISHED`, in columns that cover the same tasks.

        Args:
            part: in-domain, unseen or summary.
            methods: the recorded rows' methods.
            tasks: the recorded rows' tasks, with their categories.
        """


def all_tables(rows: Sequence[Row], beside: Published | None = None) -> list[Table]:
    """The table per task, by answer prefix if there are several, and, with several methods, the comparison tables."""
    several = len({row["method"] for row in rows}) > 1
    by_prefix = prefix_table(rows)
    first = [score_table(rows)] if by_prefix is None else [score_table(rows), by_prefix]
    return [*first, *(comparison_tables(rows, beside) if several else ())]


def comparison_tables(rows: Sequence[Row], beside: Published | None = None) -> list[Table]:
    """In-domain, unseen, both, and ATV against each other method: for each LLM, the tables that its rows allow.

    Together with the paper's published numbers these are its Tables 1, 2 and 5.
    """
    tables = []
    for llm in dict.fromkeys(row["llm"] for row in rows):
        own = [row for row in rows if row["llm"] == llm]
        kinds = {category == UNSEEN for category in tasks_of(own).values()}
        for table, unseen in ((in_domain_table, False), (unseen_table, True)):
            tables += [table(own, key, beside) for key in score_names(_of(own, unseen))]
        tables += [summary_table(own, beside)] if len(kinds) == 2 and summarised(own) else []
        tables += [comparison_table(own)] if {ATV} < {row["method"] for row in own} else []
    return tables


def in_domain_table(rows: Sequence[Row], key: str, beside: Published | None = None) -> Table:
    """Cost, category scores and their mean for each method.

    Args:
        rows: rows on one LLM.
        key: name of a score. Only rows with this score are in the table.
        beside: published numbers to show for comparison.
    """
    note = (
        "A task's score is the mean over its rows and variants, a category's the mean over its tasks, Avg the mean "
        "over the categories."
    )
    return _scores_table(rows, key, beside, note, unseen=False)


def unseen_table(rows: Sequence[Row], key: str, beside: Published | None = None) -> Table:
    """Cost, scores of the unseen tasks and their mean for each method; arguments as for `in_domain_table`."""
    note = "A task's score is the mean over its rows and variants, Avg the mean over the tasks."
    return _scores_table(rows, key, beside, note, unseen=True)


def _scores_table(rows: Sequence[Row], key: str, beside: Published | None, averaged: str, *, unseen: bool) -> Table:
    """One row per method; `averaged` says how its scores are averaged. In-domain, the columns are categories."""
    part = "unseen" if unseen else "in-domain"
    rows, first = scored(_of(rows, unseen), key), score_names(rows)[0]
    tasks = tasks_of(rows)
    lines: dict[str, Line] = {}
    left, judged = left_out(rows, key)

    def average(found: Scores) -> Score | None:
        return found.unseen if unseen else found.in_domain

    for method, asked in _by_method(rows).items():
        found = scores(defined(asked, left), key, judged)
        costs = {name: average(scores(asked, source, tasks)) for name, (source, _) in COSTS.items()}
        each = found.tasks if unseen else found.categories
        lines[method] = costs | {own_column(name): score for name, score in each.items()} | {AVERAGE: average(found)}
    published = beside.lines(part, lines, judged) if beside and key == PAPER_SCORE else {}
    note = f"{_measured(rows)} {meaning([key])} {averaged} {_SPREAD} {_COST}"
    names, without = (tasks, {*left}) if unseen else (tasks.values(), {*left.values()})
    columns = [*COSTS, *map(own_column, _ordered(names, beside.order if beside else ())), AVERAGE]
    without = {*map(own_column, without), *([AVERAGE] if left else [])}
    table = _table(f"{part.capitalize()} {key}: {rows[0]['llm']}", columns, lines, published, note, without, beside)
    plots = ("scores", "cost") if key == first else ("scores",)
    return replace(table, plots=plots, runs=runs_of(rows), footnote=footnote(rows, key))


def own_column(name: str) -> str:
    """The column of a task or category, with a name that no column of costs or averages has."""
    return f"{name} (data)" if name in COSTS or name == AVERAGE else name


def summary_table(rows: Sequence[Row], beside: Published | None = None) -> Table:
    """In-domain average, unseen average and the mean of both, for each score that has all of them."""
    names, lines, published = (
        summarised(rows),
        dict[str, dict[str, Score | None]](),
        dict[str, dict[str, Score | None]](),
    )
    without: set[str] = set()
    for name in names:
        own = scored(rows, name)
        left, judged = left_out(own, name)
        for method, asked in _by_method(rows).items():
            found = scores(defined(scored(asked, name), left), name, judged)
            averages = {"in-domain": found.in_domain, "unseen": found.unseen, "Avg": found.both}
            lines.setdefault(method, {}).update({column_of(part, name): score for part, score in averages.items()})
        if beside and name == PAPER_SCORE:
            for method, line in beside.lines("summary", lines, judged).items():
                published[method] = {column_of(part, name): score for part, score in line.items()}
        without |= {column_of(part, name) for part in averages_of(left) | ({"Avg"} if left else set())}
    note = (
        f"{_measured(rows)} In-domain: mean of the categories; unseen: mean of the unseen tasks; Avg: mean of both. "
        f"{meaning(names)} {_SPREAD}"
    )
    columns = [column_of(part, name) for name in names for part in ("in-domain", "unseen", "Avg")]
    table = _table(f"In-domain and unseen: {rows[0]['llm']}", columns, lines, published, note, without, beside)
    return replace(table, footnote=footnote(rows, *names))


def summarised(rows: Sequence[Row]) -> list[str]:
    """The scores that all tasks of the rows have, which can be averaged over all of them."""
    tasks = tasks_of(rows)
    return [name for name in score_names(rows) if tasks_of(scored(rows, name)).keys() == tasks.keys()]


def column_of(part: str, name: str) -> str:
    """The column of an average (in-domain, unseen, Avg) of a score."""
    return f"{part} {name}"


def comparison_table(rows: Sequence[Row], reference: str = ATV) -> Table:
    """A method minus each other one on the same rows: difference, interval and p, for each score.

    Args:
        rows: rows on one LLM.
        reference: the method from which the others are subtracted.
    """
    others = [method for method in _by_method(rows) if method != reference]
    lines, reasons = [], dict[str, None]()
    for key in score_names(rows):
        left, judged = left_out(scored(rows, key), key)
        for unseen in sorted({category == UNSEEN for category in (left | judged).values()}):
            without = any((category == UNSEEN) == unseen for category in left.values())
            for other in others:
                try:
                    found = paired(defined(rows, left), reference, other, key, unseen=unseen)
                    cells = [f"{100 * value:+.2f}" for value in found[:3]] + [f"{found.p:.4f}"]
                except ATVError as error:
                    cells = [MISSING] * 4
                    if any((category == UNSEEN) == unseen for category in judged.values()):
                        reasons[str(error)] = None
                cells[0] = marked(cells[0]) if without else cells[0]
                lines.append([key, "unseen" if unseen else "in-domain", other, *cells])
    note = (
        f"{_measured(rows)} The average of {reference} minus that of the other method, in percentage points, on the "
        f"same test rows, variants and seeds. From, to: 95% percentile bootstrap interval, from {RESAMPLES:,} draws of "
        "test rows within each task, a row with all its variants and seeds: how far the difference would vary with "
        "other test rows of these tasks, not with other tasks or seeds. p: two-sided permutation test that swaps the "
        f"two methods' answers to a test row ({RESAMPLES:,} times, or in all ways if fewer), not corrected for the "
        "number of comparisons. A dash: not evaluated on the same rows."
    )
    columns = ["score", "tasks", f"{reference} minus", "difference", "from", "to", "p"]
    title = f"{reference} against each other: {rows[0]['llm']}"
    note = " ".join([note, *reasons])
    return Table(title, columns, lines, note, plots=("differences",), runs=runs_of(rows), footnote=footnote(rows))


def told_apart(lines: Iterable[Sequence[str]]) -> str:
    """From which methods the reference of a comparison table differs, by the intervals of these rows of it."""
    sides: dict[str, list[str]] = {"above": [], "below": [], "not told apart from": []}
    for _, _, other, _, low, high, *_ in lines:
        if low != MISSING:
            side = "above" if float(low) > 0 else "below" if float(high) < 0 else "not told apart from"
            sides[side].append(other)
    return "; ".join(f"{side} {', '.join(others)}" for side, others in sides.items() if others)


def _of(rows: Sequence[Row], unseen: bool) -> list[Row]:
    return [row for row in rows if (row["category"] == UNSEEN) == unseen]


def left_out(rows: Sequence[Row], key: str) -> tuple[dict[str, str], dict[str, str]]:
    """The tasks for which a score is not defined, and the other tasks, each with their categories."""
    names = undefined(rows, key)
    tasks = tasks_of(rows)
    return {task: tasks[task] for task in names}, {task: its for task, its in tasks.items() if task not in names}


def averages_of(tasks: Mapping[str, str]) -> set[str]:
    """The averages that include tasks of these categories."""
    return {"unseen" if category == UNSEEN else "in-domain" for category in tasks.values()}


def defined(rows: Sequence[Row], left: Container[str]) -> list[Row]:
    """The rows without those of left-out tasks."""
    return [row for row in rows if row["task"] not in left]


def runs_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """The folders of the rows' runs."""
    return tuple(dict.fromkeys(row["run"] for row in rows))


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    return {method: found[method] for method in _ordered(found, tuple(METHODS))}


def _ordered(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """Names in the given order, then the others in their own order."""
    found = dict.fromkeys(names)
    return [*(name for name in order if name in found), *(name for name in found if name not in order)]


def _table(
    title: str,
    columns: list[str],
    ours: Mapping[str, Line],
    published: Mapping[str, Line],
    note: str,
    without: Container[str],
    beside: Published | None,
) -> Table:
    """A table; our rows are marked in columns that lack some task."""
    cells = [
        [name, *(marked(cell) if column in without else cell for column, cell in zip(columns, own, strict=True))]
        for name, own in (
            (name, [shown(line.get(column), column) for column in columns]) for name, line in ours.items()
        )
    ]
    cells += [[name, *(shown(line.get(column), column) for column in columns)] for name, line in published.items()]
    if beside and published:
        note += f" Rows marked 'paper' are other LLMs' numbers on the same tasks: {beside.source}."
    return Table(title, ["method", *columns], cells, note, text=1, bold=_best(columns, list(ours.values())))


def shown(score: Score | None, column: str) -> str:
    """A cell of a table: accuracies in percent, costs unchanged, a dash if missing."""
    if score is None:
        return MISSING
    if column in COSTS:
        return f"{score.mean:.{COSTS[column][1]}f}"
    return f"{100 * score.mean:.1f}" + ("" if score.std is None else f" ± {100 * score.std:.1f}")


def _best(columns: Sequence[str], lines: Sequence[Line]) -> frozenset[tuple[int, int]]:
    """The highest cells of each column of accuracies, to the digits shown."""
    best = set()
    for column, name in enumerate(columns, 1):
        found = {row: round(100 * score.mean, 1) for row, line in enumerate(lines) if (score := line.get(name))}
        if name not in COSTS and len(found) > 1:
            best |= {(row, column) for row, value in found.items() if value == max(found.values())}
    return frozenset(best)


def _measured(rows: Sequence[Row]) -> str:
    """What a table's numbers were measured on."""
    tasks = len(tasks_of(rows))
    examples = len({(row["task"], row["example"]) for row in rows})
    variants = len({(row["template"], row["answer_prefix"]) for row in rows})
    text = f"Measured on {_count(tasks, 'task')}, {_count(examples, 'test row')}, {_count(variants, 'prompt variant')}"
    seeds = dict.fromkeys(row["seed"] for row in rows)
    text += f", {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
    for method, own in _by_method(rows).items():
        found = dict.fromkeys(row["seed"] for row in own)
        text += f"; {method} with {', '.join(map(str, found))} alone" if len(found) < len(seeds) else ""
    return f"{text}.{_asked_otherwise(rows)}"


def _asked_otherwise(rows: Sequence[Row]) -> str:
    """A sentence about tasks whose prompts are not written alike for all methods; empty if there are none."""
    ways: dict[str, set[Any]] = {}
    for row in rows:
        ways.setdefault(row["task"], set()).add(row.get("asking"))
    differ = [task for task, asked in ways.items() if len(asked - {None}) > 1]
    if not differ:
        return ""
    return f" The methods' prompts differ in template, system message or format for {', '.join(differ)}."


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
