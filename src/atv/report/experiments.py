"""Recorded experiments: each condition's cost and scores, and differences from the reference."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from atv.errors import ATVError
from atv.evaluation.records import below, load_runs, read_run
from atv.files import read_json
from atv.progress import log
from atv.report.comparison import (
    PAPER_SCORE,
    Published,
    all_tables,
    averages_of,
    column_of,
    comparison_table,
    defined,
    in_domain_table,
    left_out,
    runs_of,
    shown,
    summarised,
)
from atv.report.statistics import Row, score_names, scored, scores, tasks_of
from atv.report.tables import MISSING, Table, footnote, marked, meaning

FOLDER = "experiments"
"""Subfolder of a reproduction's folder with one record per experiment."""
COSTS = ("trained parameters", "epochs", "training s")
"""Columns of `costs`."""

ABOUT_COSTS = (
    "Epochs: how often each training row was learned from. Training seconds are those of a whole training on its own: "
    "reading the prompts counts for each method, although it is done once for all; loading the LLM does not. A dash: "
    "there is none."
)


@dataclass(frozen=True)
class Found:
    """A recorded experiment."""

    title: str
    asks: str
    reference: str
    rows: list[Row]
    """Rows of all conditions; `method` is the condition's label."""
    trained: dict[str, list[dict[str, Any]]]
    """The training records of each condition, one per seed."""


def find_experiments(folders: Iterable[Path]) -> list[Found]:
    """The experiments recorded in reproductions in or below these folders, without leftovers in hidden folders."""
    files = dict.fromkeys(file for folder in folders for file in below(folder, f"{FOLDER}/*.json"))
    return [load_experiment(file) for file in files if is_experiment(file)]


def is_experiment(file: Path) -> bool:
    """Whether a JSON file is the record of an experiment: other projects have folders named like `FOLDER` too."""
    if not (file.parent.parent / "runs").is_dir():
        return False
    try:
        record = read_json(file, "the record of an experiment")
    except ATVError as error:
        log.warning(f"{error} It is left out.")
        return False
    return isinstance(record, dict) and record.keys() >= {"conditions", "title", "asks", "reference"}


def load_experiment(file: Path) -> Found:
    """Load an experiment's record with its runs and trainings, from the reproduction's folder."""
    record = read_json(file, "the record of an experiment")
    out = file.parent.parent
    rows = load_runs([out / run for condition in record["conditions"].values() for run in condition["runs"]])
    trained = {
        label: [read_json(out / name / "train.json", "the record of a training") for name in condition["trained"]]
        for label, condition in record["conditions"].items()
    }
    return Found(record["title"], record["asks"], record["reference"], rows, trained)


def report_tables(folders: Sequence[str | Path], beside: Published | None = None) -> tuple[list[Row], list[Table]]:
    """The rows of all runs in folders; their tables, without conditions of experiments alone; each experiment's tables.

    A run under its method's own name, which experiments share with the main tables, is in both.
    """
    experiments = find_experiments(map(Path, folders))
    rows = load_runs(folders)
    conditions = {
        run for found in experiments for run in runs_of(found.rows) if "label" in read_run(Path(run))["settings"]
    }
    named = {Path(run).resolve() for run in conditions}
    rest = [row for row in rows if Path(row["run"]).resolve() not in named]
    tables = all_tables(rest, beside) if rest else []
    return rows, tables + [table for found in experiments for table in experiment_tables(found, beside)]


def experiment_tables(found: Found, beside: Published | None = None) -> list[Table]:
    """Each condition's cost and scores; categories; the reference against each other condition.

    Args:
        found: the experiment. Each LLM gets its own tables.
        beside: published numbers to show for comparison.
    """
    tables = []
    for llm in dict.fromkeys(row["llm"] for row in found.rows):
        rows = [row for row in found.rows if row["llm"] == llm]
        tables.append(_overview(found, rows))
        known = score_names(rows)
        tables.append(in_domain_table(rows, PAPER_SCORE if PAPER_SCORE in known else known[0], beside))
        if len({row["method"] for row in rows}) > 1:
            tables.append(comparison_table(rows, found.reference))
    return [replace(table, title=f"{found.title}. {table.title}") for table in tables]


def _overview(found: Found, rows: Sequence[Row]) -> Table:
    """One row per condition: number of trained parameters, training time, and all averages."""
    tasks = tasks_of(rows)
    names = summarised(rows)
    columns = ["tokens", "s/query", *(column_of(part, name) for part in ("in-domain", "unseen") for name in names)]
    without = {column_of(part, name) for name in names for part in averages_of(left_out(rows, name)[0])}
    lines = []
    for label in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == label]
        values: dict[str, Any] = {
            "tokens": scores(own, "prompt_tokens", tasks).in_domain,
            "s/query": scores(own, "seconds", tasks).in_domain,
        }
        for name in names:
            left, judged = left_out(rows, name)
            averages = scores(defined(scored(own, name), left), name, judged)
            values |= {column_of("in-domain", name): averages.in_domain, column_of("unseen", name): averages.unseen}
        cells = {column: shown(values[column], column) for column in columns}
        cells |= {column: marked(cells[column]) for column in without}
        lines.append([label, *costs(found.trained[label]), *cells.values()])
    note = (
        f"{found.asks} Reference: {found.reference}. In-domain: mean of the categories; unseen: mean of the unseen "
        f"tasks, in percent. {meaning(names)} {ABOUT_COSTS}"
    )
    return Table(
        f"Conditions: {rows[0]['llm']}",
        ["condition", *COSTS, *columns],
        lines,
        note,
        text=1,
        footnote=footnote(rows, *names),
    )


def costs(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The cells of `COSTS` for the records of one training per data set and seed; dashes if nothing is trained."""
    epochs = [max((entry.get("epoch", 0.0) for entry in record.get("history", ())), default=0.0) for record in records]
    found = [
        [record.get("trainable_parameters") for record in records],
        [count or None for count in epochs],
        [record.get("seconds") for record in records],
    ]
    values = [[value for value in column if value is not None] for column in found]
    return [f"{fmean(column):.0f}" if column else MISSING for column in values]
