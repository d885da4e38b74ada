"""Output of the command line."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from atv.processes import is_main
from atv.report.tables import Table

output = Console(quiet=not is_main())
LONGEST_NAME = 40
"""Columns with longer words are wrapped if the terminal is too narrow; names are not, up to half of its width."""


def print_table(table: Table) -> None:
    """Print a table. If the terminal is too narrow, lines are wrapped and nothing is dropped."""
    room = output.width // 2  # for names, so that long ones leave the other columns legible
    grid = RichTable(title=Text(table.title), title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for index, column in enumerate(table.columns):
        words = index < table.text
        longest = max((len(row[index]) for row in table.rows), default=0)
        names = words and longest <= min(LONGEST_NAME, room)
        room -= longest if names else 0
        grid.add_column(Text(column), justify="left" if words else "right", no_wrap=names)
    shared = table.text - 1  # columns that are not repeated on the next line
    for number, row in enumerate(table.rows):
        again = number > 0 and table.rows[number - 1][:shared] == row[:shared]
        cells = [*[""] * shared, *row[shared:]] if again else row
        styles = ("bold" if (number, index) in table.bold else "" for index in range(len(cells)))
        grid.add_row(*(Text(cell, style) for cell, style in zip(cells, styles, strict=True)))
    output.print(grid)
    output.print(f"\n{table.notes}\n", style="dim", highlight=False, markup=False)


def print_lines(lines: Iterable[str]) -> None:
    """Print plain lines unchanged."""
    for line in lines:
        output.print(line, markup=False, highlight=False, soft_wrap=True)
