"""What the command line prints."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as RichTable

from atv.processes import is_main
from atv.report.tables import Table

output = Console(quiet=not is_main())


def print_table(table: Table) -> None:
    """A recorded table on the screen; in a terminal that is too narrow for it lines are wrapped, nothing is dropped."""
    grid = RichTable(title=table.title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for index, column in enumerate(table.columns):
        grid.add_column(column, justify="left" if index < 3 else "right", no_wrap=index < 3)
    for before, row in zip([None, *table.rows], table.rows, strict=False):
        again = before is not None and before[:2] == row[:2]
        grid.add_row(*(["", "", *row[2:]] if again else row))
    output.print(grid)
    output.print(f"\n{table.note}", style="dim", highlight=False)


def print_lines(lines: Sequence[str]) -> None:
    """Plain lines, exactly as they are."""
    for line in lines:
        output.print(line, markup=False, highlight=False, soft_wrap=True)
