"""A recorded comparison of methods on data sets: scores, differences, training cost, and learning curves."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atv.data import UNSEEN
from atv.evaluation.records import load_runs
from atv.files import read_json
from atv.report.comparison import (
    ATV,
    AVERAGE,
    comparison_table,
    in_domain_table,
    left_out,
    own_column,
    shown,
    told_apart,
)
from atv.report.experiments import ABOUT_COSTS, COSTS, costs
from atv.report.statistics import Row, Scores, score_names, scored, scores, tasks_of
from atv.report.tables import MISSING, Table, marked, meaning

CONSTANT = "constant answer"
"""Row of the score of always giving the most frequent answer."""
_ALL_OR_NOTHING = {
    "first_token",
    "first_token_among_options",
    "option_likelihood",
    "option_likelihood_per_byte",
    "exact_match",
}
"""Scores that are 1 for the answer and 0 for any other: those of a constant answer follow from the answers alone."""


@dataclass(frozen=True)
class Comparison:
    """A comparison by its number of training rows (None: all), in ascending order."""

    rows: dict[int | None, list[Row]]
    """Rows of all runs. Those of a method that uses no training rows stand for every number of them and every seed."""
    trained: dict[int | None, dict[str, list[dict[str, Any]]]]
    """Training records of each method."""

    @property
    def most(self) -> int | None:
        """The largest number of training rows."""
        return list(self.rows)[-1]


def load_comparison(file: Path) -> Comparison:
    """Load the record `compare.json` with its runs and trainings.

    Raises:
        ATVError: a file is missing or damaged, or a run is not finished.
    """
    record = read_json(file, "the record of a comparison")
    cells, out = record["cells"], file.parent
    counts = sorted({cell["rows"] for cell in cells}, key=lambda rows: (rows is None, rows or 0))
    seeds = list(dict.fromkeys(cell["seed"] for cell in cells))
    named = {str(out / cell["run"]): cell for cell in cells}
    found: dict[int | None, list[Row]] = {rows: [] for rows in counts}
    trained: dict[int | None, dict[str, list[dict[str, Any]]]] = {rows: {} for rows in counts}
    alone = {name for name, many in Counter(cell["method"] for cell in cells).items() if many == _data_sets(cells)}
    for row in load_runs([out / cell["run"] for cell in cells]):
        cell = named[row["run"]]
        one = row | {"method": cell["method"]}
        everywhere = cell["method"] in alone
        for rows in counts if everywhere else [cell["rows"]]:
            found[rows] += [one | {"seed": seed} for seed in (seeds if everywhere else [cell["seed"]])]
    for cell in cells:
        if cell["trained"] is not None:
            record = read_json(out / cell["trained"] / "train.json", "the record of a training")
            trained[cell["rows"]].setdefault(cell["method"], []).append(record)
    return Comparison(found, trained)


def _data_sets(cells: Sequence[Mapping[str, Any]]) -> int:
    return len({cell["task"] for cell in cells})


def compare_tables(found: Comparison, reference: str = ATV) -> list[Table]:
    """Scores by data set, the learning curve if there is one, differences from the reference, and training cost.

    Args:
        found: the comparison.
        reference: the method from which the others are subtracted, if it is one of those compared.
    """
    rows = found.rows[found.most]
    tables = [_scores(rows, key) for key in score_names(rows)]
    if len(found.rows) > 1:
        tables += [_curve(found, key) for key in score_names(rows)[:1]]
    if {reference} < {row["method"] for row in rows}:
        tables.append(_differences(rows, reference))
    return [*tables, _cost(found)]


def answer(rows: Sequence[Row], size: str = "", unit: str = "in-domain tasks", reference: str = ATV) -> str:
    """The result in two sentences: who scores best on average, and how the reference compares to the others.

    Methods whose means are equal as shown score best together.

    Args:
        rows: rows on one LLM; those of unseen tasks are not used.
        size: what is said about the training rows, such as " with 90 training rows".
        unit: what the average is over.
        reference: the method that is compared to the others, if it is one of them.

    Returns:
        The sentences; empty if no method was evaluated on all tasks.
    """
    rows = [row for row in rows if row["category"] != UNSEEN]
    key = next(iter(score_names(rows)), "")
    rows = scored(rows, key)
    tasks = tasks_of(rows)
    means = {method: scores(own, key, tasks).in_domain for method, own in _by_method(rows).items()}
    known = {method: round(100 * score.mean, 1) for method, score in means.items() if score is not None}
    if not known:
        return ""
    best = sorted(method for method, mean in known.items() if mean == max(known.values()))
    where = f"on average over {len(tasks)} {unit}" if len(tasks) > 1 else f"on {next(iter(tasks))}"
    constant = _constant(rows, key).in_domain
    # Methods with one mean have their own spreads.
    reached = shown(means[best[0]], key) if len(best) == 1 else f"{known[best[0]]:.1f}"
    text = f"{_listed(best)} score{'s' * (len(best) == 1)} best {where}{size}: {reached}% ({key})"
    if constant is not None:
        text += f"; always giving the most frequent answer scores {shown(constant, key)}%"
    text += "."
    said = ""
    if {reference} < means.keys():
        said = told_apart(line for line in comparison_table(rows, reference).rows if line[0] == key)
    own = "" if reference in best else f", which scores {shown(means[reference], key)}%," if said else ""
    return f"{text} By the 95% intervals, {reference}{own} is {said}." if said else text


def _listed(names: Sequence[str]) -> str:
    """Names as in a sentence."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    return found


def _constant(rows: Sequence[Row], key: str) -> Scores:
    """The scores of always giving a task's most frequent answer, averaged like a method's; none for other scores."""
    judged = left_out(rows, key)[1] if key in _ALL_OR_NOTHING else {}
    targets: dict[str, dict[int, str]] = {task: {} for task in judged}
    for row in rows:
        if row["task"] in judged:
            targets[row["task"]][row["example"]] = row["target"]
    made: list[Row] = []
    for task, answers in targets.items():
        most = Counter(answers.values()).most_common(1)[0][0]
        made += [{"task": task, "seed": None, "scores": {key: float(each == most)}} for each in answers.values()]
    return scores(made, key, judged)


def _scores(rows: Sequence[Row], key: str) -> Table:
    """Costs, a column for each data set, and the mean over data sets."""
    table = in_domain_table(rows, key)
    left, constant = left_out(scored(rows, key), key)[0], _constant(scored(rows, key), key)
    note = (
        f"{table.note.partition('. ')[0]}. {meaning([key])} A data set's score is the mean over its test rows, Avg the "
        "mean over data sets; in percent, the mean over seeds ± the sample standard deviation over seeds. A method "
        "that uses no training rows stands for every seed. Tokens: of the prompt; seconds: everything done for a query."
    )
    lines = list(table.rows)
    if constant.in_domain is not None:
        note += f" Last row: {CONSTANT}, which always gives the most frequent answer."
        found = {own_column(name): score for name, score in constant.categories.items()}
        found |= {AVERAGE: constant.in_domain}
        without = {*map(own_column, left.values()), AVERAGE} if left else set()
        cells = [(column, shown(found.get(column), column)) for column in table.columns[1:]]
        lines.append([CONSTANT, *(marked(cell) if column in without else cell for column, cell in cells)])
    return replace(table, title=f"Scores: {key}", rows=lines, note=note)


def _curve(found: Comparison, key: str) -> Table:
    """Each method's mean over data sets, by the number of training rows."""
    lines = []
    names = list(dict.fromkeys(row["method"] for rows in found.rows.values() for row in rows))
    tasks = tasks_of(scored(next(iter(found.rows.values())), key))
    for method in names:
        cells = []
        for rows in found.rows.values():
            own = [row for row in scored(rows, key) if row["method"] == method]
            cells.append(shown(scores(own, key, tasks).in_domain if own else None, key))
        lines.append([method, *cells])
    columns = ["all rows" if rows is None else f"{rows} rows" for rows in found.rows]
    note = f"{meaning([key])} In percent: the mean over data sets, ± the sample standard deviation over seeds."
    return Table(f"By training rows: {key}", ["method", *columns], lines, note, text=1, plots=("curve",))


def _differences(rows: Sequence[Row], reference: str) -> Table:
    """The reference minus each other method: over all data sets, and for each one."""
    every = comparison_table(rows, reference)
    names: dict[str, str] = {}
    for key in score_names(rows):
        left, judged = left_out(scored(rows, key), key)
        having = [*(judged or left)]
        names[key] = f"all {len(having)}" if len(having) > 1 else having[0]
    lines = [[line[0], names[line[0]], *line[2:]] for line in every.rows]
    for task in tasks_of(rows):
        own = comparison_table([row for row in rows if row["task"] == task], reference).rows
        lines += [[line[0], task, *line[2:]] for line in own if names[line[0]] != task]
    columns = [every.columns[0], "data", *every.columns[2:]]
    return replace(every, title=f"{reference} against each other method", columns=columns, rows=lines)


def _cost(found: Comparison) -> Table:
    """Trained parameters and seconds of each method's training, and seconds per query."""
    rows = found.rows[found.most]
    tasks = tasks_of(rows)
    lines = []
    for method, own in _by_method(rows).items():
        records = found.trained[found.most].get(method, [])
        query = scores(own, "seconds", tasks).in_domain
        lines.append([method, *costs(records), MISSING if query is None else f"{query.mean:.4f}"])
    note = f"Means over data sets and seeds. {ABOUT_COSTS}"
    return Table("Cost", ["method", *COSTS, "s/query"], lines, note, text=1)
