"""What the command line prints."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as RichTable

from atv.report.tables import Table

output = Console()


def print_table(table: Table) -> None:
    """A recorded table on the screen; columns that do not fit a narrow terminal are folded, never dropped."""
    grid = RichTable(title=table.title, title_justify="left")
    for index, column in enumerate(table.columns):
        grid.add_column(column, justify="left" if index < 2 else "right", overflow="fold")
    for number, row in enumerate(table.rows):
        grid.add_row(*row, end_section=number == len(table.rows) - 2)
    output.print(grid)
    output.print(table.note, style="dim", highlight=False)


def print_lines(lines: Sequence[str]) -> None:
    """Plain lines, exactly as they are."""
    for line in lines:
        output.print(line, markup=False, highlight=False, soft_wrap=True)
