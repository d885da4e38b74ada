"""Plots of tables with matplotlib: as files, and as SVG inside a page, where text has the page's colour."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from atv.report.analysis_plots import map_plot, norms_plot
from atv.report.classification_plots import confusion_plot, reliability_plot
from atv.report.comparison import ATV, PUBLISHED, told_apart
from atv.report.figure import (
    FILES,
    INK,
    STYLE,
    Drawn,
    add_legend,
    inline,
    mark,
    name_lines,
    new_figure,
    written,
)
from atv.report.tables import Table, number

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_LEADER = {"arrowstyle": "-", "color": INK, "alpha": 0.35, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}


@dataclass(frozen=True)
class Plot:
    """A plot with its description and numbers."""

    kind: str
    text: str
    """Description for readers who cannot see the plot."""
    table: Table
    """Title and the plotted numbers."""
    svg: str
    """SVG for use inside a page."""
    files: dict[str, bytes]
    """File contents by suffix."""


def draw(table: Table, name: str) -> list[Plot]:
    """Make the plots of a table, without the paper's rows, which are from other LLMs.

    Args:
        table: with names of plots, from this package.
        name: name of the plot in the page, which makes the ids inside its SVG unique.
    """
    from matplotlib import rc_context  # here, so that tables do not need matplotlib

    table = _drawable(table)
    plots = []
    for kind in table.plots:
        with rc_context(STYLE):  # type: ignore[arg-type]
            drawn = _KINDS[kind](table)
            if drawn is None:
                continue
            figure, text, numbers = drawn
            files = {suffix: written(figure, suffix, facecolor="white", **how) for suffix, how in FILES.items()}
            svg = inline(written(figure, ".svg", transparent=True), f"{name}-{kind}", numbers.title, text)
        plots.append(Plot(kind, text, numbers, svg, files))
    return plots


def _scores(table: Table) -> Drawn:
    """Each method's average as a bar, with its parts as marks in separate rows, so that equal ones stay visible."""
    parts = table.columns[table.columns.index("s/query") + 1 : -1]
    numbers = _numbers(table, table.title, [*parts, "Avg"])
    if not numbers.rows:
        return None
    figure, (axes,) = new_figure([(0.3 + 0.04 * len(parts)) * len(numbers.rows) + 0.4], legend=len(parts))
    for place, (method, *cells) in enumerate(numbers.rows):
        average = number(cells[-1])
        if average is not None:
            axes.barh(place, average, 0.76, color=INK, alpha=0.34 if method == ATV else 0.16, linewidth=0)
            spread = cells[-1].partition(" ± ")[2]
            if spread:
                axes.hlines(place, average - float(spread), average + float(spread), color=INK, linewidth=1)
        axes.text(103, place, cells[-1], va="center")
    for index, part in enumerate(parts):
        shift = 0.64 * ((index + 0.5) / len(parts) - 0.5)
        values = [(number(row[1 + index]), place + shift) for place, row in enumerate(numbers.rows)]
        known = [(value, place) for value, place in values if value is not None]
        axes.plot(*zip(*known, strict=True), label=part, **mark(index)) if known else None
    axes.set(xlim=(0, 101), xlabel=f"{table.title.split(':')[0]}, %; bar and number: Avg")
    name_lines(axes, [row[0] for row in numbers.rows])
    add_legend(figure, axes, parts)
    text = "Average in percent: " + ", ".join(f"{row[0]} {row[-1]}" for row in numbers.rows) + "."
    return figure, text, numbers


def _cost(table: Table) -> Drawn:
    """The average against seconds and prompt tokens per query; labels at the side, connected to their points."""
    from matplotlib.ticker import LogLocator

    numbers = _numbers(table, f"Cost and {table.title[0].lower()}{table.title[1:]}", ["Avg", "s/query", "tokens"])
    numbers.rows[:] = [row for row in numbers.rows if None not in map(number, row[1:])]
    if not numbers.rows:
        return None
    height = max(1.7, 0.19 * len(numbers.rows))
    figure, panels = new_figure([height + 0.4] * 2)
    for axes, column, label in zip(panels, (2, 3), ("seconds per query", "prompt tokens per query"), strict=True):
        points = sorted((number(row[1]) or 0.0, number(row[column]) or 0.0, row[0]) for row in numbers.rows)
        low, high = max(points[0][0] - 5, 0), min(points[-1][0] + 5, 100)
        costs = [cost for _, cost, _ in points]
        if min(costs) > 0 and max(costs) > 8 * min(costs):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
        axes.set(ylim=(low, high), xlabel=label, ylabel="Avg, %")
        axes.margins(x=0.08)
        places = _apart([value for value, *_ in points], 0.17 * (high - low) / height, low, high)
        for (value, cost, method), place in zip(points, places, strict=True):
            axes.plot(cost, value, **mark(int(method == ATV)))
            side = axes.get_yaxis_transform()  # next to the axes, at the height of a value
            axes.annotate(method, (cost, value), (1.06, place), textcoords=side, va="center", arrowprops=_LEADER)
    shown = (f"{row[0]} {row[1]} at {row[2]} s and {row[3]} tokens" for row in numbers.rows)
    return figure, f"Average in percent against cost per query: {', '.join(shown)}.", numbers


def _differences(table: Table) -> Drawn:
    """The reference minus each other method, with 95% intervals: a panel for each score."""
    reference = table.columns[2].removesuffix(" minus")
    rows = [row[:6] for row in table.rows if number(row[3]) is not None]
    if not rows:
        return None
    accuracies, kinds, others = (list(dict.fromkeys(row[column] for row in rows)) for column in range(3))
    each = max(0.36, 0.09 * len(kinds))  # inches of one method
    figure, panels = new_figure([each * len(others) + 0.4] * len(accuracies), legend=len(kinds))
    gap = min(0.24, 0.96 / len(kinds))  # a method's lines stay apart from those of the next
    for axes, accuracy in zip(panels, accuracies, strict=True):
        if axes is not panels[0]:
            axes.sharex(panels[0])
        axes.axvline(0, color=INK, linewidth=0.8)
        for index, kind in enumerate(kinds):
            lines = [row for row in rows if row[:2] == [accuracy, kind]]
            at = [others.index(row[2]) + gap * (index - (len(kinds) - 1) / 2) for row in lines]
            value, low, high = ([number(row[column]) or 0.0 for row in lines] for column in (3, 4, 5))
            axes.hlines(at, low, high, color=mark(index)["color"], linewidth=1.6)
            [points] = axes.plot(value, at, label=kind, **mark(index))
            points.set_in_layout(bool(lines))  # an empty one, kept for the legend, has no place
        axes.set_title(accuracy, fontsize=9, loc="left")
        axes.set_xlabel(f"{reference} minus the other, percentage points")
        name_lines(axes, others)
    add_legend(figure, panels[0], kinds)
    groups = dict.fromkeys((row[0], row[1]) for row in rows)
    text = " ".join(
        f"{', '.join(group)}: {told_apart(row for row in rows if (row[0], row[1]) == group)}." for group in groups
    )
    numbers = Table(table.title, table.columns[:6], rows, "")
    return figure, f"{reference} by the 95% intervals, each taken alone. {text}", numbers


def _curve(table: Table) -> Drawn:
    """Each method's score against the number of training rows, with its spread over seeds."""
    rows = [row for row in table.rows if any(number(cell) is not None for cell in row[1:])]
    if not rows:
        return None
    figure, (axes,) = new_figure([2.4], legend=len(rows))
    places = range(len(table.columns) - 1)
    for index, (method, *cells) in enumerate(rows):
        known = [(place, cell) for place, cell in zip(places, cells, strict=True) if number(cell) is not None]
        at, values = [place for place, _ in known], [number(cell) or 0.0 for _, cell in known]
        spread = [float(cell.partition(" ± ")[2] or 0) for _, cell in known]
        axes.errorbar(at, values, spread, label=method, **mark(index) | {"linestyle": "-", "linewidth": 1})
    axes.set_xticks(places, table.columns[1:])
    axes.set(xlabel="training rows of a data set", ylabel=f"{table.title.partition(': ')[2]}, %")
    axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
    names = [row[0] for row in rows]
    add_legend(figure, axes, names)
    text = "In percent, by training rows: " + "; ".join(
        f"{method} " + ", ".join(f"{cell} with {column}" for cell, column in zip(cells, table.columns[1:], strict=True))
        for method, *cells in rows
    )
    return figure, f"{text}.", Table(table.title, table.columns, rows, "", text=1)


def _drawable(table: Table) -> Table:
    """A table with a mark in the place of each character that XML, and so SVG, does not allow."""
    title, *columns = (_NOT_XML.sub("\ufffd", text) for text in (table.title, *table.columns))
    rows = [[_NOT_XML.sub("\ufffd", cell) for cell in row] for row in table.rows]
    return replace(table, title=title, columns=columns, rows=rows)


_KINDS: dict[str, Callable[[Table], Drawn]] = {
    "scores": _scores,
    "cost": _cost,
    "differences": _differences,
    "curve": _curve,
    "norms": norms_plot,
    "map": map_plot,
    "confusion": confusion_plot,
    "reliability": reliability_plot,
}


def _numbers(table: Table, title: str, columns: Sequence[str]) -> Table:
    """The rows of our own methods that have any number, in these columns."""
    places = [0, *(table.columns.index(column) for column in columns)]
    rows = [[row[place] for place in places] for row in table.rows if not row[0].startswith(PUBLISHED)]
    known = [row for row in rows if any(number(cell) is not None for cell in row[1:])]
    return Table(title, [table.columns[place] for place in places], known, "", text=1)


def _apart(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions for labels of ascending values: near them, at least `gap` apart, inside the axes if they fit."""
    places: list[float] = []
    for value in values:
        places.append(max(value, places[-1] + gap if places else low))
    ceiling = high
    for index in range(len(places) - 1, -1, -1):
        places[index] = ceiling = min(places[index], ceiling)
        ceiling -= gap
    return places
