"""Shared by all figures: size, colours and marks, and writing to a file or inside a page."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from atv.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1b1b1b"
"""Colour of text and lines; inside a page, the page's text colour."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6a00")
"""Okabe and Ito's colours for colour-blind readers, those visible on both white and black; shapes are redundant."""
_SHAPES = "os^DvP<*"
_WIDTH = 4.4  # inches: as wide as a phone, so that text stays legible on one
STYLE = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "atv", "text.parse_math": False,
          "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False} | dict.fromkeys(
    ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK
)  # fmt: skip
FILES: dict[str, dict[str, Any]] = {
    ".svg": {"metadata": {"Date": None}},
    ".png": {"dpi": 200},
    ".pdf": {"metadata": {"CreationDate": None}},
}


Drawn = tuple["Figure", str, Table] | None
"""A figure, its description, and its numbers; None if there is nothing to draw."""


def new_figure(heights: Sequence[float], legend: int = 0) -> tuple["Figure", list["Axes"]]:
    """Stacked panels with these heights in inches, and room for a legend of `legend` entries."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.2 * legend), layout="constrained")
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    return figure, list(panels)


def mark(index: int) -> dict[str, Any]:
    """Colour and shape of the points of a group."""
    colour, shape = COLOURS[index % len(COLOURS)], _SHAPES[index % len(_SHAPES)]
    return {"color": colour, "marker": shape, "linestyle": "none", "markersize": 5, "zorder": 3, "clip_on": False}


def name_lines(axes: "Axes", names: Sequence[str]) -> None:
    """Label the plot's horizontal lines with names, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, pad=7)
    axes.grid(axis="x", color=INK, alpha=0.15, linewidth=0.6)
    axes.set_axisbelow(True)


def add_legend(figure: "Figure", axes: "Axes", names: Sequence[str]) -> None:
    """Add a legend of the groups in `axes`, below the panels."""
    columns = max(1, min(3, 54 // (max(map(len, names)) + 6)))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, handletextpad=0.2)


def written(figure: "Figure", suffix: str, **how: Any) -> bytes:
    """A figure as the bytes of a file with this suffix."""
    file = io.BytesIO()
    figure.savefig(file, format=suffix[1:], **how)
    return file.getvalue()


def inline(svg: bytes, name: str, title: str, text: str) -> str:
    """An SVG file as an element of a page: unique ids, the page's text colour, and text for screen readers."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = _bare(element.tag)
        found = {_bare(key): value.replace(INK, "currentColor") for key, value in element.attrib.items()}
        for key, value in found.items():
            if key == "id" or (key == "href" and value.startswith("#")):
                found[key] = f"#{name}-{value[1:]}" if key == "href" else f"{name}-{value}"
            found[key] = found[key].replace("url(#", f"url(#{name}-")
        element.attrib = found
    box = root.attrib["viewBox"]
    root.attrib = {"viewBox": box, "role": "img", "aria-labelledby": f"{name}-title {name}-text", "class": "plot"}
    for place, (tag, words) in enumerate((("title", title), ("desc", text))):
        element = ElementTree.Element(tag, {"id": f"{name}-{'title' if tag == 'title' else 'text'}"})
        element.text = words
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


def _bare(name: str) -> str:
    """A tag or attribute without its namespace: inside HTML an SVG has none."""
    return name.rpartition("}")[2]
