"""From a drawing to inline SVG that follows the page's colours, light or dark; or to a PNG file.

matplotlib draws with marker colours; each is replaced by a CSS variable of the page's style, or in
a picture by the light theme's colour. Same input, same text: ids are salted with the figure's name,
and no date is written. No pyplot, so nothing global is left behind.
"""

# matplotlib's stubs leave its **kwargs untyped.
# pyright: reportUnknownMemberType=false

import io
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, LINE, BAND = "#010101", "#010102", "#010103", "#010104"
OURS, SECOND, THIRD, BASELINE, ALARM = "#010105", "#010106", "#010107", "#010108", "#010109"
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    BAND: "var(--band)",
    OURS: "var(--series-1)",
    SECOND: "var(--series-2)",
    THIRD: "var(--series-3)",
    BASELINE: "var(--series-0)",
    ALARM: "var(--bad)",
}
# The light theme of style.css.j2, for pictures that stand alone.
LIGHT = {
    INK: "#16202c",
    MUTED: "#5a6675",
    LINE: "#dde2e8",
    BAND: "#f1f4f7",
    OURS: "#1f5fbf",
    SECOND: "#d9730d",
    THIRD: "#0f8b7d",
    BASELINE: "#9aa6b4",
    ALARM: "#b3261e",
}

WIDTH_IN = 11.0
PNG_DPI = 150

_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.0,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.0,
    "axes.titlecolor": INK,
    "figure.labelsize": 9.0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "ytick.minor.size": 0.0,
    "legend.frameon": False,
}

MARKERS = {marker: marker for marker in VARIABLES}

Draw = Callable[[Figure], None]
Paint = Callable[[Figure, Mapping[str, str]], None]  # with the colour to use for each marker


def make_panels(figure: Figure, number: int, heights: Sequence[float] | None = None) -> list[Axes]:
    """Return axes, one below the other."""
    grid = figure.subplots(number, 1, squeeze=False, height_ratios=heights)
    return list(grid[:, 0])


def to_svg(name: str, height_in: float, draw: Draw) -> str:
    """Run `draw` on a figure under the page's style and return its SVG.

    Args:
        name: Prefix of the ids; two figures of a page need different ones.
        height_in: Height for a width of `WIDTH_IN`.
        draw: Draws with the marker colours of this module.
    """
    buffer = io.StringIO()
    with _page_style({"svg.hashsalt": f"treeq-{name}"}):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _make_inline(buffer.getvalue(), name)


def to_png(height_in: float, draw: Paint) -> bytes:
    """Run `draw` on a figure and return a PNG file.

    Args:
        height_in: Height for a width of `WIDTH_IN`.
        draw: Draws with the colours that it is given for the markers: the light theme's.
    """
    buffer = io.BytesIO()
    style = {key: LIGHT.get(value, value) for key, value in _STYLE.items()}
    with _page_style({**style, "savefig.facecolor": "white"}):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        draw(figure, LIGHT)
        figure.savefig(buffer, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return buffer.getvalue()


@contextmanager
def _page_style(changes: dict[Any, Any]) -> Generator[None]:
    """Set the page's style whatever the reader's own settings are; put those back afterwards."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({**_STYLE, **changes})
        yield


def _make_inline(svg: str, name: str) -> str:
    """Turn an SVG document into an element that can stand in an HTML page among others.

    Namespaces, metadata, style sheets and the fixed size go; ids get a prefix; marker colours
    become variables of the page.
    """
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{_SVG}metadata" or child.tag == f"{_SVG}style":
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        link = element.attrib.pop(_LINK, None)
        if link is not None:
            element.set("href", link)
        for key, value in element.attrib.items():
            element.set(key, _rewrite_attribute(key, value, name))
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img"}
    return ElementTree.tostring(root, encoding="unicode")


def _rewrite_attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    value = value.replace("url(#", f"url(#{name}-")
    if key == "href":
        value = value.replace("#", f"#{name}-", 1)
    if key == "style":
        for color, variable in VARIABLES.items():
            value = value.replace(color, variable)
    return value
