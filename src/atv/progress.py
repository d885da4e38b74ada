"""Progress bars on standard error, so that standard output stays a clean result."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from atv.processes import is_main

console = Console(stderr=True, quiet=not is_main())


def note(message: str) -> None:
    """One line for the person who watches, on standard error; of several processes the main one speaks."""
    console.print(message, highlight=False, markup=False, soft_wrap=True)


_SAID: set[str] = set()


def note_once(message: str) -> None:
    """As `note`, but nothing that was said before in this process: ten methods on one task need one warning of it."""
    if message not in _SAID:
        _SAID.add(message)
        note(message)


class Bar:
    """A running progress bar: advance it, or change what stands before it."""

    def __init__(self, progress: Progress, task: int) -> None:
        self._progress, self._task = progress, task

    def advance(self, steps: int = 1) -> None:
        """Move on by `steps`."""
        self._progress.advance(self._task, steps)  # type: ignore[arg-type]

    def describe(self, text: str) -> None:
        """Change the text before the bar."""
        self._progress.update(self._task, description=text)  # type: ignore[arg-type]

    def reach(self, steps: int) -> None:
        """Set the number of finished steps, as after a resume."""
        self._progress.update(self._task, completed=steps)  # type: ignore[arg-type]


@contextmanager
def bar(description: str, total: int) -> Iterator[Bar]:
    """A progress bar of `total` steps with elapsed and remaining time; gone from the screen's way at the end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(progress, progress.add_task(description, total=total))
