"""Plots of a classifier: confusion matrices, and accuracy against probability."""

from atv.report.figure import COLOURS, INK, Drawn, add_legend, mark, new_figure
from atv.report.tables import Table

_CELL = 0.3  # inches
_LONGEST = 16  # characters of a label on an axis
_FITTING = 36  # characters of labels beside each other


def confusion_plot(table: Table) -> Drawn:
    """A matrix of counts for each method; the shade of a cell is its share of its row."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    labels, methods = table.columns[2:], list(dict.fromkeys(row[0] for row in table.rows))
    lines = {method: [row for row in table.rows if row[0] == method] for method in methods}
    figure, panels = new_figure([_CELL * len(own) + 1.3 for own in lines.values()])
    # From transparent, so that an empty cell has the colour of whatever the plot is on.
    shades = LinearSegmentedColormap.from_list("shares", [to_rgba(COLOURS[0], alpha) for alpha in (0, 0.6)])
    rotation = 90 if len(labels) * max(len(_short(label)) for label in labels) > _FITTING else 0
    ticks = [place + 0.5 for place in range(len(labels))]
    for axes, (method, own) in zip(panels, lines.items(), strict=True):
        counts = [[int(cell) for cell in row[2:]] for row in own]
        shares = [[count / sum(row) for count in row] for row in counts]
        axes.pcolormesh(shares, cmap=shades, vmin=0, vmax=1, edgecolors=to_rgba(INK, 0.15), linewidth=0.6)
        for line, row in enumerate(counts):
            for column, count in enumerate(row):
                size = min(8, 70 / len(labels))
                axes.text(
                    column + 0.5, line + 0.5, str(count), ha="center", va="center", fontsize=size
                ) if count else None
        axes.set_xticks(ticks, map(_short, labels), rotation=rotation)
        axes.set_yticks([place + 0.5 for place in range(len(own))], [_short(row[1]) for row in own])
        axes.set_ylim(len(own), 0)
        axes.tick_params(length=0)
        axes.set_title(method, fontsize=9, loc="left")
        axes.set(xlabel="predicted", ylabel="answer")
    text = " ".join(f"{method}: {_diagonal(labels, own)}." for method, own in lines.items())
    return figure, f"Rows on the diagonal are right. {text}", table


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST else f"{label[:_LONGEST]}…"


def _diagonal(labels: list[str], lines: list[list[str]]) -> str:
    right = sum(int(row[2 + labels.index(row[1])]) for row in lines)
    return f"{right} of {sum(int(cell) for row in lines for cell in row[2:])} rows are right"


def reliability_plot(table: Table) -> Drawn:
    """Accuracy against the predicted option's probability; a calibrated method is on the diagonal."""
    methods = list(dict.fromkeys(row[0] for row in table.rows))
    figure, (axes,) = new_figure([3.2], legend=len(methods))
    axes.plot([0, 100], [0, 100], color=INK, linewidth=0.8, alpha=0.6)
    for index, method in enumerate(methods):
        points = [(float(row[3]), float(row[4])) for row in table.rows if row[0] == method]
        axes.plot(*zip(*points, strict=True), label=method, **mark(index) | {"linestyle": "-", "linewidth": 1})
    axes.set(xlim=(0, 101), ylim=(0, 101), xlabel="probability of the predicted option, %", ylabel="accuracy, %")
    axes.grid(color=INK, alpha=0.15, linewidth=0.6)
    add_legend(figure, axes, methods)
    spans = (
        f"{row[0]}: {row[4]} percent right at a probability of {row[3]} percent ({row[2]} rows)." for row in table.rows
    )
    return figure, f"The line is perfect calibration. {' '.join(spans)}", table
