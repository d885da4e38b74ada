"""Progress bars and the logger `atv`, both on standard error, so that standard output contains only results.

`logging.getLogger("atv").setLevel(logging.WARNING)` silences progress messages and bars, but not warnings.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from statistics import fmean

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from atv.processes import is_main

console = Console(stderr=True, quiet=not is_main())
log = logging.getLogger("atv")


class _ToConsole(logging.Handler):
    """Writes records without disturbing the bars; only the main process writes."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        console.print(self.format(record), highlight=False, markup=False, soft_wrap=True)


if not log.handlers:  # an application that has configured this logger keeps its configuration
    log.addHandler(_ToConsole())
    log.propagate = False
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)

_WARNED: set[str] = set()


def log_once(message: str, level: int = logging.WARNING) -> None:
    """Log a warning, or a message of another level, unless this process has logged the same one before."""
    if message not in _WARNED:
        _WARNED.add(message)
        log.log(level, message)


LINE_EVERY = 30.0
"""Seconds between two lines about a running bar where no bar can be drawn, such as in a log file."""


class Bar:
    """A running progress bar; where standard error is not a terminal, a line every `LINE_EVERY` seconds."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self._next = time.monotonic() + LINE_EVERY

    def advance(self, steps: int = 1) -> None:
        """Advance by `steps`."""
        self._progress.advance(self._task, steps)
        if not _draws() and time.monotonic() >= self._next:
            log.info(self._line())
            self._next = time.monotonic() + LINE_EVERY

    def _line(self) -> str:
        task = self._progress.tasks[0]
        left = f", about {_duration(task.time_remaining)} left" if task.time_remaining is not None else ""
        return f"{task.description}: {task.completed:.0f} of {task.total:.0f} in {_duration(task.elapsed or 0)}{left}"

    def describe(self, text: str) -> None:
        """Change the text before the bar."""
        self._progress.update(self._task, description=text)

    def reach(self, steps: int) -> None:
        """Set the number of finished steps, for example after a resume."""
        self._progress.update(self._task, completed=steps)


def _draws() -> bool:
    return console.is_terminal or console.is_jupyter


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def bar(description: str, total: int) -> Iterator[Bar]:
    """Show a progress bar of `total` steps with elapsed and remaining time while the context lasts."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not log.isEnabledFor(logging.INFO)) as progress:
        yield Bar(progress, progress.add_task(description, total=total))


class Steps:
    """Logs which of several steps begins, and about how long those that are left take.

    Args:
        kinds: the kind of each step, in any order. A step is expected to take as long as those of its kind did.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self._left, self._count = Counter(kinds), len(kinds)
        self._seconds: dict[str, list[float]] = {}
        self._kind, self._began = "", 0.0

    def begin(self, kind: str, what: str) -> None:
        """Log that a step of this kind begins."""
        place = self._count - self._left.total() + 1
        log.info(f"[{place} of {self._count}] {what}{self._rest()}")
        self._kind, self._began = kind, time.perf_counter()

    def end(self, new: bool = True) -> None:
        """Count the step as done; its time counts unless it was done before."""
        self._left[self._kind] -= 1
        if new:
            self._seconds.setdefault(self._kind, []).append(time.perf_counter() - self._began)

    def _rest(self) -> str:
        known = {kind: fmean(seconds) for kind, seconds in self._seconds.items()}
        minutes = sum(count * known.get(kind, 0.0) for kind, count in self._left.items()) / 60
        if any(count and kind not in known for kind, count in self._left.items()):  # it may be the slowest of all
            return f"; more than {minutes:.0f} min left" if minutes >= 1 else ""
        return f"; about {minutes:.0f} min left" if minutes >= 1 else "; less than a minute left"
