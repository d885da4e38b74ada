"""Write records to docs/performance.md: the tables between its marks, and one plot per record with panels.

No figure on that page is typed by hand: run this after a benchmark.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from atv.files import write_text
from benchmarks.common import HEADS, RESULTS, cells, number

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BLOCK = re.compile(r"<!-- table:([\w-]+) -->.*?<!-- end -->", re.DOTALL)
# Okabe and Ito's colours for colour-blind readers; markers and hatches distinguish series in print.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
MARKERS = ("o", "s", "^", "D")


def main(argv: Sequence[str] | None = None) -> None:
    """Write all blocks and plots that have a record."""
    parse = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").split("\n")[0])
    parse.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parse.add_argument(
        "--page", type=Path, default=PAGE, help="the page; its plots go into a folder with the same name"
    )
    given = parse.parse_args(argv)
    records = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(given.results.glob("*.json"))}
    plots = given.page.with_suffix("")
    for name, record in records.items():
        if record["panels"]:
            plot(record, plots / f"{name}.svg")

    def filled(match: re.Match[str]) -> str:
        name = match[1]
        body = block(records[name], f"{plots.name}/{name}.svg") if name in records else missing(name)
        return f"<!-- table:{name} -->\n{body}\n<!-- end -->"

    write_text(given.page, BLOCK.sub(filled, given.page.read_text(encoding="utf-8")))


def missing(name: str) -> str:
    """The text of a block without measurements."""
    cuda = name.endswith("-cuda")
    command = "python -m benchmarks.gpu_day --device cuda" if cuda else f"python -m benchmarks.{name}"
    command = command.replace("serving_", "serving --engine ")
    return f"*Not measured yet: `{command}`, then `python -m benchmarks.report`.*"


def block(record: Mapping[str, Any], plot_file: str) -> str:
    """A record as Markdown: table, how it was made, plot."""
    lines = ["*Tiny random models: these figures mean nothing.*", ""] if record["tiny"] else []
    lines += ["| " + " | ".join(HEADS) + " |", "| --- | ---: | ---: | --- |"]
    lines += ["| " + " | ".join(cells(measure)) + " |" for measure in record["measures"]]
    sizes = ", ".join(f"{name}: {_short(value)}" for name, value in record["sizes"].items())
    hardware, versions = record["hardware"], record["versions"]
    machine = f"{hardware['gpu'] or hardware['cpu']}, {hardware['threads']} threads of {hardware['cores']} cores"
    used = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions)
    lines += [
        "",
        f"`{record['command']}` on {record['date']}: medians of {record['rounds']} rounds, seed {record['seed']}; "
        f"{sizes}.",
        f"{machine}, {hardware['memory GiB']:g} GiB; Python {record['python']}, {used}; "
        f"commit {(record['commit'] or 'unknown')[:8]}.",
    ]
    return "\n".join([*lines, "", f"![{record['title']}]({plot_file})"] if record["panels"] else lines)


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) and value < 1 else str(value)


def plot(record: Mapping[str, Any], file: Path) -> None:
    """A record's panels side by side."""
    matplotlib.rcParams.update(
        {"svg.hashsalt": "atv", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    panels = record["panels"]
    figure = Figure(figsize=(4 + 3.2 * len(panels), 3.8), layout="constrained", facecolor="white")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        {"lines": _lines, "curves": _curves, "bars": _bars, "stacked": _stacked}[panel["kind"]](axis, panel["series"])
        axis.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"])
        if panel["log"]:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.yaxis.set_minor_formatter(NullFormatter())
        else:
            axis.set_ylim(bottom=0)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        if len(panel["series"]) > 1:
            axis.legend(frameon=False, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None, "Title": record["title"]})


def _spread(points: Sequence[Mapping[str, float]]) -> list[list[float]]:
    return [[p["value"] - p["low"] for p in points], [p["high"] - p["value"] for p in points]]


def _lines(axis: Axes, series: Mapping[str, Any]) -> None:
    for index, (label, points) in enumerate(series.items()):
        x, y = [p["x"] for p in points], [p["value"] for p in points]
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        axis.errorbar(x, y, _spread(points), label=label, color=colour, marker=marker, capsize=3)
    axis.set_xscale("log", base=2)
    axis.set_xticks(x, [str(value) for value in x])


def _curves(axis: Axes, series: Mapping[str, Any]) -> None:
    """Lines whose points lie anywhere, as in time."""
    for index, (label, points) in enumerate(series.items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        axis.plot([p["x"] for p in points], [p["value"] for p in points], label=label, color=colour, marker=marker)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(ScalarFormatter())


def _groups(axis: Axes, series: Mapping[str, Any]) -> list[Any]:
    """The groups of bars on the x axis; not every series has all of them."""
    groups = list(dict.fromkeys(point["x"] for points in series.values() for point in points))
    slanted: dict[str, Any] = {"rotation": 20, "ha": "right"} if len(groups) > 3 else {}
    axis.set_xticks(range(len(groups)), [str(group) for group in groups], **slanted)
    return groups


def _bars(axis: Axes, series: Mapping[str, Any]) -> None:
    groups, width = _groups(axis, series), 0.8 / len(series)
    for index, (label, points) in enumerate(series.items()):
        x = [groups.index(p["x"]) + (index - (len(series) - 1) / 2) * width for p in points]
        heights = [p["value"] for p in points]
        colour = COLOURS[index % len(COLOURS)]
        bars = axis.bar(x, heights, width, yerr=_spread(points), capsize=3, color=colour, label=label)
        axis.bar_label(bars, [number(height) for height in heights], padding=2, fontsize=7)


def _stacked(axis: Axes, series: Mapping[str, Any]) -> None:
    groups = _groups(axis, series)
    base = [0.0] * len(groups)
    for index, (label, points) in enumerate(series.items()):
        heights = [p["value"] for p in points]
        hatch = "//" if index % 2 else None
        colour = COLOURS[index % len(COLOURS)]
        axis.bar(range(len(groups)), heights, 0.5, base, color=colour, edgecolor="white", hatch=hatch, label=label)
        base = [a + b for a, b in zip(base, heights, strict=True)]


if __name__ == "__main__":
    main()
