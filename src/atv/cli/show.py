"""What the command line prints."""

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table as RichTable

from atv.report.tables import Table

output = Console()


def print_table(table: Table) -> None:
    """A recorded table on the screen; in a terminal that is too narrow for it lines are wrapped, nothing is dropped."""
    grid = RichTable(title=table.title, title_justify="left", box=SIMPLE, pad_edge=False)
    for index, column in enumerate(table.columns):
        grid.add_column(column, justify="left" if index < 3 else "right", overflow="fold")
    for row, after in zip(table.rows, [*table.rows[1:], None], strict=True):
        grid.add_row(*row, end_section=after is not None and after[0] != row[0])
    output.print(grid)
    output.print(f"\n{table.note}", style="dim", highlight=False)


def print_lines(lines: Sequence[str]) -> None:
    """Plain lines, exactly as they are."""
    for line in lines:
        output.print(line, markup=False, highlight=False, soft_wrap=True)
