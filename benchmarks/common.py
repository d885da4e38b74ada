"""Shared by all benchmarks: options, alternating rounds, and a record of measurements with their targets."""

import argparse
import datetime
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import set_seed

from atv.files import write_json
from atv.progress import bar
from atv.provenance import provenance

RESULTS = Path(__file__).parent / "results"
SEED = 42
ENOUGH = 0.3
"""Seconds. A faster side is repeated within its round, to reduce the effect of clock and scheduler."""
output = Console()


@dataclass(frozen=True)
class Options:
    """The command line's options."""

    device: str
    threads: int
    rounds: int
    tiny: bool
    out: Path
    command: str


def parser(module: str, document: str | None) -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks."""
    parse = argparse.ArgumentParser(prog=f"python -m {module}", description=(document or "").split("\n")[0])
    parse.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parse.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch")
    parse.add_argument("--rounds", type=int, default=5, help="number of rounds; each side runs once per round")
    parse.add_argument("--tiny", action="store_true", help="small random models, only to check that it runs")
    parse.add_argument("--out", type=Path, help="folder for the record; benchmarks/results by default")
    return parse


def options_of(given: argparse.Namespace, module: str, argv: Sequence[str] | None) -> Options:
    """Validate the options, and set threads and seed."""
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU here; leave it out, or run this on a machine with one.")
    if given.rounds < 1 or given.threads < 1:
        raise SystemExit("--rounds and --threads: expected a whole number from 1.")
    torch.set_num_threads(given.threads)
    set_seed(SEED)
    words = list(sys.argv[1:] if argv is None else argv)
    if "--out" in words:  # where the record lies does not belong to how it was made
        del words[words.index("--out") : words.index("--out") + 2]
    return Options(
        given.device,
        given.threads,
        given.rounds,
        given.tiny,
        given.out or (RESULTS / "tiny" if given.tiny else RESULTS),
        shlex.join(["python", "-m", module, *words]),
    )


def parse_options(module: str, document: str | None, argv: Sequence[str] | None) -> Options:
    """Parse the options of a benchmark without further ones."""
    return options_of(parser(module, document).parse_args(argv), module, argv)


# ---- time ----


def clock(device: str) -> float:
    """The time in seconds, after synchronising the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _seconds(side: Callable[[], object], repeats: int, device: str) -> float:
    began = clock(device)
    for _ in range(repeats):
        side()
    return (clock(device) - began) / repeats


def in_turn(title: str, sides: Mapping[str, Callable[[], object]], options: Options) -> dict[str, list[float]]:
    """Seconds per call of each side in each round: A, B, C, A, B, C, ..., so that a slow minute meets all of them.

    A first round, not counted, warms up and determines the number of repetitions of a fast side.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with bar(title, len(sides) * (options.rounds + 1)) as progress:
        repeats = {}
        for name, side in sides.items():
            once = _seconds(side, 1, options.device)
            if not options.tiny and once < 4 * ENOUGH:  # the first call includes setup: time another one
                once = _seconds(side, 1, options.device)
            repeats[name] = 1 if options.tiny else max(1, round(ENOUGH / once))
            progress.advance()
        for _ in range(options.rounds):
            for name, side in sides.items():
                seconds[name].append(_seconds(side, repeats[name], options.device))
                progress.advance()
    return seconds


# ---- figures ----


@dataclass(frozen=True)
class Figure:
    """A median with the lowest and the highest value of the rounds."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        """The figure of the rounds' values."""
        return cls(median(values), min(values), max(values))


def rate(count: float, seconds: Sequence[float]) -> Figure:
    """`count` things in each of `seconds`, as things per second."""
    return Figure(count / median(seconds), count / max(seconds), count / min(seconds))


def ratio(above: Sequence[float], below: Sequence[float]) -> Figure:
    """Ratio of the medians, with the lowest and the highest ratio of two values of the same round."""
    each = [a / b for a, b in zip(above, below, strict=True)]
    return Figure(median(above) / median(below), min(each), max(each))


def times(factor: float, values: Sequence[float]) -> list[float]:
    """Every value multiplied by a factor, for example to change the unit."""
    return [factor * value for value in values]


# ---- the record ----


class Record:
    """The record that a benchmark writes to `NAME.json` and shows as a table.

    Args:
        name: name of the benchmark; `-cuda` is appended on a GPU.
        title: title of the table.
        options: the command line's options.
        sizes: what was measured on: models, rows, tokens.
    """

    def __init__(self, name: str, title: str, options: Options, **sizes: Any) -> None:
        self.options = options
        self.file = options.out / f"{name}{'-cuda' if options.device == 'cuda' else ''}.json"
        self.title = title
        self.sizes = sizes
        self.measures: list[dict[str, Any]] = []
        self.panels: list[dict[str, Any]] = []
        self.seconds: dict[str, list[float]] = {}

    def measure(self, what: str, unit: str, figure: Figure | float, target: tuple[str, float] | None = None) -> None:
        """Add a row to the table; `target` is ("at least" or "at most", a number)."""
        figure = figure if isinstance(figure, Figure) else Figure(figure, figure, figure)
        line: dict[str, Any] = {"what": what, "unit": unit, **asdict(figure)}
        if target is not None:
            bound, number = target
            reached = figure.value >= number if bound == "at least" else figure.value <= number
            line |= {"target": f"{bound} {number:g}", "reached": reached}
        self.measures.append(line)

    def plot(
        self, title: str, x: str, y: str, series: Mapping[str, Mapping[Any, Figure]], *, kind: str, log: bool = False
    ) -> None:
        """Add a panel to the benchmark's plot.

        Args:
            title: of the panel.
            x: name of the x axis.
            y: name of the y axis.
            series: {x: figure} by legend entry.
            kind: bars, stacked (bars), lines (x on a scale of powers of two) or curves.
            log: whether y is on a logarithmic scale.
        """
        drawn = {
            label: [{"x": at, **asdict(figure)} for at, figure in points.items()] for label, points in series.items()
        }
        self.panels.append({"title": title, "x": x, "y": y, "kind": kind, "log": log, "series": drawn})

    def keep(self, prefix: str, seconds: Mapping[str, list[float]]) -> None:
        """Record every round's measured seconds."""
        self.seconds |= {f"{prefix}{name}": values for name, values in seconds.items()}

    def finish(self) -> Path:
        """Write the record and show the table."""
        about = {
            "title": self.title,
            "tiny": self.options.tiny,
            "command": self.options.command,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "seed": SEED,
            "rounds": self.options.rounds,
            "device": self.options.device,
            "hardware": hardware(self.options),
            "sizes": self.sizes,
        }
        write_json(
            self.file,
            about
            | provenance()
            | {"measures": self.measures, "panels": self.panels, "seconds per call, each round": self.seconds},
        )
        show(self.title, self.measures)
        return self.file


def hardware(options: Options) -> dict[str, Any]:
    """The machine, in words and numbers."""
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    memory = round(psutil.virtual_memory().total / 2**30, 1)
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "memory GiB": memory,
        "gpu": gpu,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def number(value: float) -> str:
    """A number with three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cells(measure: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """A measure as text: what, measured, lowest to highest, target."""
    single = measure["low"] == measure["high"]
    spread = "" if single else f"{number(measure['low'])} to {number(measure['high'])}"
    target = f"{measure['target']}: {'reached' if measure['reached'] else 'missed'}" if "target" in measure else ""
    return measure["what"], f"{number(measure['value'])} {measure['unit']}", spread, target


HEADS = ("what", "measured", "lowest to highest", "target")


def show(title: str, measures: Sequence[Mapping[str, Any]]) -> None:
    """Print the table."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for index, head in enumerate(HEADS):
        table.add_column(head, justify="right" if index in (1, 2) else "left")
    for measure in measures:
        colour = ("green" if measure["reached"] else "red") if "target" in measure else None
        table.add_row(*cells(measure), style=colour)
    output.print(table)
