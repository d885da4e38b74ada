"""`atv paper analysis`: analysis of an adapter's vectors as a record, tables and plots."""

import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from atv import artifact
from atv.cli.loading import frozen_llm, named_tasks
from atv.cli.options import Analysis
from atv.cli.output import print_lines, print_table
from atv.data import Task
from atv.errors import ATVError
from atv.evaluation.measure import Frozen
from atv.evaluation.records import ANALYSIS_FILE, SCHEMA
from atv.files import require_writable, write_json
from atv.lm.hooks import input_device
from atv.methods.elicit import Elicit
from atv.model import ATVModel
from atv.paper.analysis import analyse, require_sklearn
from atv.provenance import provenance
from atv.report import analysis_tables, write_plots, write_tables
from atv.report.analysis import SHORT


def analyse_adapter(given: Analysis) -> None:
    """Analyse an adapter, after checking everything possible before a model is loaded."""
    require_packages()
    folder = artifact.locate(given.adapter)
    saved = artifact.read(folder, ATVModel.method)
    library = artifact.locate(given.elicit) if given.elicit else None
    if library is not None:
        artifact.read(library, Elicit.name)
    named = frozen_llm(given.llm or saved.base_llm["name"], given.loading)
    how = {"rows": given.rows, "query": given.query, "seed": given.seed}
    write_analysis(named, named_tasks(given.tasks, saved.training), folder, library, given.out, **how)
    print_lines([f"Next: atv report {given.out} --out report.html"])


def require_packages() -> None:
    """Raise ATVError if a package that an analysis needs is missing."""
    require_sklearn()
    if find_spec("matplotlib") is None:
        raise ATVError(
            "The plots need the package matplotlib, which is not installed. Install it with: "
            "pip install 'adaptive-task-vectors[analysis]'"
        )


def write_analysis(
    named: Frozen, tasks: Sequence[Task], adapter: Path, library: Path | None, out: Path, **how: Any
) -> None:
    """Analyse an adapter's vectors, write the results to the folder `out`, print the short tables.

    Args:
        named: the LLM.
        tasks: the tasks whose queries are analysed.
        adapter: folder of the ATV's adapter.
        library: folder of an ELICIT library to show for comparison.
        out: folder for the record, tables and plots; existing ones are replaced.
        how: `rows`, `query` and `seed`, as for `analyse`.
    """
    require_writable(out)
    llm, tokenizer = named.load()
    atv = ATVModel.from_pretrained(adapter, llm, tokenizer=tokenizer)
    elicit = Elicit.load(llm, tokenizer, library) if library else None
    began = time.perf_counter()
    found = analyse(atv, tasks, elicit=elicit, **how)
    settings = {
        "method": "atv paper analysis",
        **named.described(),
        **how,
        "adapter": artifact.identity(adapter),
        "elicit": artifact.identity(library) if library else None,
        "tasks": {task.name: task.digest("train", "test") for task in tasks},
        "asking": {task.name: task.asking() for task in tasks},
    }
    seconds = round(time.perf_counter() - began, 3)
    about = {"schema": SCHEMA, "settings": settings, "seconds": seconds, "device": str(input_device(llm))}
    record = about | provenance() | found
    write_json(out / ANALYSIS_FILE, record)
    tables = analysis_tables(record)
    for table in tables[:SHORT]:
        print_table(table)
    written = [*write_tables(tables, out / "analysis.md"), *write_plots(tables, out / "plots")]
    print_lines([f"Written to {out / ANALYSIS_FILE}", *(f"Written to {path}" for path in written)])
