"""Plots of an analysis: norms per layer, and the map of vectors."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from atv.report.figure import COLOURS, INK, Drawn, add_legend, mark, new_figure
from atv.report.tables import Table, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES = ("-", "--", "-.")
_SMALL = 3.5


def norms_plot(table: Table) -> Drawn:
    """Norms of vectors, residual stream and library entries, layer by layer, and the cosine below."""
    from matplotlib.ticker import MaxNLocator

    names = [name for name in table.columns[1:] if name not in ("vector / residual", "cosine")]
    layers = [int(row[0]) for row in table.rows]
    figure, (top, below) = new_figure([2.2, 1.4], legend=len(names))
    for index, name in enumerate(names):
        _line(top, table, layers, name, index)
    values = [value for name in names for value in _column(table, name)]
    if min(values) > 0 and max(values) > 10 * min(values):
        top.set_yscale("log")
        top.yaxis.set_major_formatter("{x:g}")
        top.yaxis.set_minor_formatter("")
    else:
        top.set_ylim(bottom=0)
    _line(below, table, layers, "cosine", 0)
    below.axhline(0, color=INK, linewidth=0.8)
    top.set_ylabel("norm")
    below.set(xlabel="layer", ylabel="cosine")
    for axes in (top, below):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
    below.sharex(top)
    add_legend(figure, top, names)
    text = " ".join(_course(name, layers, _column(table, name)) for name in [*names, "cosine"])
    return figure, f"Means over queries, bands one standard deviation wide on either side. {text}", table


def _column(table: Table, name: str) -> list[float]:
    place = table.columns.index(name)
    return [number(row[place]) or 0.0 for row in table.rows]


def _line(axes: "Axes", table: Table, layers: Sequence[int], name: str, index: int) -> None:
    place = table.columns.index(name)
    values = _column(table, name)
    spread = [number(row[place].partition(" ± ")[2]) or 0.0 for row in table.rows]
    # A logarithmic axis needs positive values; a mean of norms may be smaller than its standard deviation.
    ends = [(value - wide, value + wide, value / 4) for value, wide in zip(values, spread, strict=True)]
    low = [low if name == "cosine" else max(low, floor) for low, _, floor in ends]
    high = [high for _, high, _ in ends]
    axes.fill_between(layers, low, high, color=COLOURS[index], alpha=0.2, linewidth=0)
    look = mark(index) | {"linestyle": _LINES[index], "linewidth": 1.2, "markersize": _SMALL}
    axes.plot(layers, values, label=name, **look)


def _course(name: str, layers: Sequence[int], values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return (
        f"{name}: {values[0]:g} at layer {layers[0]}, {values[-1]:g} at layer {layers[-1]}, least {low:g} at layer "
        f"{layers[values.index(low)]}, most {high:g} at layer {layers[values.index(high)]}."
    )


def map_plot(table: Table) -> Drawn:
    """Vectors as points in the colour and shape of their task, library entries as crosses in its colour."""
    tasks = list(dict.fromkeys(row[0] for row in table.rows))
    kinds = list(dict.fromkeys(row[1] for row in table.rows))
    names = [*tasks, *kinds[1:]]
    figure, panels = new_figure([2.9, 2.9], legend=len(names))
    for axes, start, title in zip(panels, (3, 5), ("PCA", "t-SNE"), strict=True):
        for index, task in enumerate(tasks):
            for kind in kinds:
                points = [(float(row[start]), float(row[start + 1])) for row in table.rows if row[:2] == [task, kind]]
                look = mark(index) | {"markersize": _SMALL}
                look |= {"marker": "x", "markersize": 5, "zorder": 2} if kind != kinds[0] else {"label": task}
                axes.plot(*zip(*points, strict=True), **look) if points else None
        axes.plot([], [], color=INK, marker="x", linestyle="none", label=kinds[1]) if kinds[1:] else None
        axes.set_title(title, fontsize=9, loc="left")
        axes.set(xticks=[], yticks=[])
    add_legend(figure, panels[0], names)
    counts = (f"{task} {sum(row[0] == task and row[1] == kinds[0] for row in table.rows)}" for task in tasks)
    crosses = sum(row[1] != kinds[0] for row in table.rows)
    text = f"Vectors of test queries on two maps, a mark for each: {', '.join(counts)}."
    if crosses:
        text += f" Crosses, in the colour of their task: {crosses} of {kinds[1]}."
    return figure, text, table
