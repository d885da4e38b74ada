"""A self-contained page: sortable tables, plots with the numbers behind them, provenance."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from atv.evaluation.records import read_run
from atv.files import write_bytes, write_text
from atv.report.formats import slug
from atv.report.plots import Plot, draw
from atv.report.statistics import Row
from atv.report.tables import Table, number

_FIRST, _LAST = ("method", "seed", "rows", "seconds"), "folder"  # in every run's row, even if all are equal


def write_page(
    rows: Sequence[Row],
    tables: Sequence[Table],
    out: Path,
    command: str,
    analyses: Sequence[Mapping[str, Any]] = (),
    answer: str = "",
) -> list[Path]:
    """Write a page of tables with plots, which are also written to a folder next to it; returns the files.

    Args:
        rows: from `load_runs`. The folders of their runs must still exist.
        tables: tables of these rows and of the analyses.
        out: file of the page.
        command: the command line that the user typed.
        analyses: from `load_analyses`.
        answer: the result in words, shown first.
    """
    folder = out.with_name(f"{out.stem}_plots")
    drawn = _drawn(tables)
    sections = []
    for table, plots in zip(tables, drawn, strict=True):
        shown = []
        for name, plot in plots:
            links = {suffix[1:].upper(): quote(f"{folder.name}/{name}{suffix}") for suffix in plot.files}
            shown.append({"plot": plot, "svg": Markup(plot.svg), "links": links})
        sections.append({"table": table, "plots": shown})
    runs = list(dict.fromkeys(str(row["run"]) for row in rows))
    facts = [_facts(read_run(Path(run)), run, sum(row["run"] == run for row in rows)) for run in runs]
    facts += [_facts(record, record["file"], len(record["queries"])) for record in analyses]
    shared, each = provenance_of(facts)
    page = _template().render(
        sections=sections,
        made_of=_made_of(len(rows), len(runs), len(analyses)),
        command=command,
        answer=answer,
        shared=shared,
        each=each,
        runs={fact["folder"]: f"run-{index}" for index, fact in enumerate(facts, 1)},
        style=Markup(_text("page.css")),
        script=Markup(_text("page.js")),
        script_hash=base64.b64encode(hashlib.sha256(_text("page.js").encode()).digest()).decode(),
    )
    written = _write(drawn, folder)
    write_text(out, page)
    return [out, *written]


def write_plots(tables: Sequence[Table], folder: Path) -> list[Path]:
    """Write the plots of tables to a folder, as SVG, PNG and PDF; returns the files."""
    return _write(_drawn(tables), folder)


def _drawn(tables: Sequence[Table]) -> list[list[tuple[str, Plot]]]:
    """The plots of each table, with their file names."""
    return [
        [(f"{index}-{slug(table.title)}-{plot.kind}", plot) for plot in draw(table, f"plot-{index}")]
        for index, table in enumerate(tables, 1)
    ]


def _write(drawn: Sequence[Sequence[tuple[str, Plot]]], folder: Path) -> list[Path]:
    files = {
        folder / f"{name}{suffix}": data
        for plots in drawn
        for name, plot in plots
        for suffix, data in plot.files.items()
    }
    for file, data in files.items():
        write_bytes(file, data)
    return list(files)


def _made_of(predictions: int, runs: int, analyses: int) -> str:
    """A page's contents in words."""
    parts = [f"{predictions:,} predictions of {runs} run{'s' * (runs != 1)}"] if runs else []
    parts += [f"the vectors of {analyses} adapter{'s' * (analyses != 1)}"] if analyses else []
    return " and ".join(parts)


def provenance_of(runs: Sequence[Mapping[str, str]]) -> tuple[dict[str, str], Table]:
    """What all runs have in common, and a table of the differences, one row per run."""
    names = list(dict.fromkeys(name for run in runs for name in run))
    others = [name for name in names if name not in (*_FIRST, _LAST)]
    alike = [name for name in others if len({run.get(name) for run in runs}) == 1]
    columns = [*_FIRST, *(name for name in others if name not in alike), _LAST]
    lines = [[run.get(name, "–") for name in columns] for run in runs]
    return {name: runs[0][name] for name in alike}, Table("The runs", columns, lines, "", text=1)


def _facts(run: Mapping[str, Any], place: str, rows: int) -> dict[str, str]:
    """The facts in the description of a run or an analysis, by name, without unset ones."""
    settings = run.get("settings", {})
    method = run.get("method")
    configuration = (method if isinstance(method, dict) else run).get("config")
    facts = {
        "method": settings.get("method"),
        "LLM": settings.get("llm"),
        **{name: settings.get(name) for name in ("revision", "dtype", "quantization", "seed", "variants", "adapter")},
        "configuration": _listed(configuration),
        "rows": rows,
        "seconds": run.get("seconds"),
        **{name: run.get(name) for name in ("device", "machine", "processes", "commit", "python")},
        "versions": _listed(run.get("versions")),
        "folder": place,
    }
    return {name: str(value) for name, value in facts.items() if value is not None and value != ""}


def _listed(settings: Any) -> str:
    known = settings.items() if isinstance(settings, dict) else ()
    return ", ".join(f"{name} {value}" for name, value in known if value is not None)


def _text(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _template() -> Any:
    """The template. All values are escaped, except those marked as markup above."""
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters["number"] = number
    return page.from_string(_text("page.html"))
