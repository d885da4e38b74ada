"""Tables as text: Markdown, LaTeX and CSV."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from atv.errors import ATVError
from atv.files import write_text
from atv.report.tables import MARK, MISSING, Table

_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--",
          "<": "$<$", ">": "$>$", MARK: r"$\dagger$"} | {mark: f"\\{mark}" for mark in "&%$#_{}"}  # fmt: skip


def markdown(table: Table) -> str:
    """A table as Markdown."""
    lines = [f"# {_unbroken(table.title)}", "", "| " + " | ".join(map(_unbroken, table.columns)) + " |"]
    aligned = (" --- " if index < table.text else " ---: " for index in range(len(table.columns)))
    lines.append("|" + "|".join(aligned) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in _cells(table, "**{}**", _unbroken)]
    return "\n".join([*lines, "", table.notes, ""])


def latex(table: Table) -> str:
    """A table as LaTeX, for a document with the package booktabs."""
    columns = "l" * table.text + "r" * (len(table.columns) - table.text)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escaped(table.title)}. {_escaped(table.notes)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(_escaped(column) for column in table.columns) + r" \\",
            r"\midrule",
            *(" & ".join(row) + r" \\" for row in _cells(table, r"\textbf{{{}}}", _escaped)),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def comma_separated(table: Table) -> str:
    """A table as CSV: bare numbers, standard deviations in separate columns, empty cells for dashes.

    The footnote of marked cells is in an additional last column, in rows with such cells.
    """
    numbers = range(table.text, len(table.columns))  # texts stay as they are
    spread = [
        index in numbers and any(" ± " in row[index] for row in table.rows) for index in range(len(table.columns))
    ]
    names = [[name, f"{name} std"] if wide else [name] for name, wide in zip(table.columns, spread, strict=True)]
    lines = [[part for parts in names for part in parts] + ["note"] * bool(table.footnote)]
    for row in table.rows:
        parts = [[*cell.split(" ± "), ""][:2] if wide else [cell] for cell, wide in zip(row, spread, strict=True)]
        note = table.footnote if any(MARK in cell for cell in row[table.text :]) else ""
        bare = [part.rstrip(MARK) for pair in parts[table.text :] for part in pair]
        cells = row[: table.text] + ["" if part == MISSING else part for part in bare]
        lines.append(cells + [note] * bool(table.footnote))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


FORMATS = {".md": markdown, ".tex": latex, ".csv": comma_separated}
PAGE = ".html"
"""Written by `report.page`, which needs more than tables."""


def check_format(out: Path, page: bool = False) -> None:
    """Raise ATVError if the file's suffix is not a known format or the format cannot be written.

    Args:
        out: the file to write.
        page: whether an HTML page with plots is allowed too.
    """
    known = [*FORMATS, PAGE] if page else list(FORMATS)
    if out.suffix not in known:
        named = f"{', '.join(known[:-1])} or {known[-1]}"
        raise ATVError(f"{out} ends in {out.suffix!r}; expected a name that ends in {named}.")
    if out.suffix == PAGE and find_spec("matplotlib") is None:
        raise ATVError(
            f"The plots of {out} need the package matplotlib, which is not installed. Install it with: "
            "pip install 'adaptive-task-vectors[report]'; or write .md, .tex or .csv, which have none."
        )


def slug(title: str) -> str:
    """A title in a form for file names."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:80]


def write_tables(tables: Sequence[Table], out: Path) -> list[Path]:
    """Write all tables to the file `out`, or for CSV to one numbered file per table next to it; returns the files.

    Raises:
        KeyError: `out` does not end in .md, .tex or .csv; `check_format` tells users beforehand.
    """
    texts = [FORMATS[out.suffix](table) for table in tables]
    files = {out: "\n".join(texts)}
    if out.suffix == ".csv":
        names = [
            out.with_name(f"{out.stem}-{number}-{slug(table.title)}.csv") for number, table in enumerate(tables, 1)
        ]
        files = dict(zip(names, texts, strict=True))
    for file, text in files.items():
        write_text(file, text)
    return list(files)


def _cells(table: Table, mark: str, written: Callable[[str], str] = str) -> list[list[str]]:
    """The written cells, bold ones inside `mark`."""
    return [
        [
            mark.format(written(cell)) if (row, index) in table.bold else written(cell)
            for index, cell in enumerate(cells)
        ]
        for row, cells in enumerate(table.rows)
    ]


def _unbroken(text: str) -> str:
    """Text for a cell or a heading in Markdown, which ends at a line break and, in a table, at a bar."""
    return " ".join(text.splitlines()).replace("|", r"\|")


def _escaped(text: str) -> str:
    """Escape text for LaTeX; a number's minus becomes a minus sign."""
    text = re.sub(r"^-(?=\d)", "\0", text)
    return "".join(_LATEX.get(letter, letter) for letter in text).replace("\0", "$-$")
