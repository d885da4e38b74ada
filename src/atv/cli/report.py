"""`atv report` and `atv paper tables`. Does not import torch."""

import shlex
from importlib.util import find_spec

from atv.cli.options import Report
from atv.cli.output import print_lines, print_table
from atv.evaluation.records import load_analyses
from atv.report import (
    FORMATS,
    analysis_tables,
    answer,
    check_format,
    classification_details,
    classification_tables,
    classified,
    report_tables,
    write_page,
    write_tables,
)
from atv.report.analysis import SHORT
from atv.report.comparison import Published


def show_tables(given: Report, command: str, beside: Published | None = None) -> None:
    """Print the tables of runs, and write them if --out is given.

    Args:
        given: the options.
        command: name of the command, for the page's provenance.
        beside: published numbers to show for comparison.
    """
    out = given.out
    if out is not None:
        check_format(out, page=True)
    analyses = load_analyses(given.runs)
    rows, tables = report_tables(given.runs, beside)
    found = [analysis_tables(record) for record in analyses]
    details, hints = [], []
    if classified(rows) and find_spec("sklearn") is None:
        hints += ["Tables of classification need scikit-learn: pip install 'adaptive-task-vectors[report]'"]
    else:
        tables += classification_tables(rows)
        details += classification_details(rows) if given.details or out is not None else []
        if classified(rows) and not given.details and out is None:
            hints += ["Print each label, confusion matrices, calibration and confident mistakes with --details."]
    for table in [*tables, *(details if given.details else ()), *(table for some in found for table in some[:SHORT])]:
        print_table(table)
    if out is None:
        hints += ["Write the tables to a file with --out report.html, or .md, .tex or .csv."]
        print_lines(hints)
        return
    tables += details + [table for some in found for table in some]
    made_by = shlex.join(["atv", *command.split(), *map(str, given.runs), "--out", str(out)])
    alike = len({row["llm"] for row in rows}) == 1 and len({row["method"] for row in rows}) > 1
    said = answer(rows) if alike else ""
    written = (
        write_tables(tables, out) if out.suffix in FORMATS else write_page(rows, tables, out, made_by, analyses, said)
    )
    print_lines([*hints, *(f"Written to {path}" for path in written)])
