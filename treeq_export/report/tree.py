"""The search's tree as an icicle: a row per depth, a box per node, as wide as it has leaves.

The upper half of a box is coloured by average weight bits, the lower by average activation bits of
the chosen plan. Drawn by hand, since the page's colours between two widths are mixed by CSS.
"""

import math
from collections.abc import Sequence
from xml.etree import ElementTree

from treeq_export.ops import MAX_BITS, MIN_BITS
from treeq_export.records import SearchNode
from treeq_export.report.quantities import format_fixed

WIDTH = 1060.0
_HALF = 17.0  # height of half a box
_GAP_X, _GAP_Y = 1.5, 5.0
_CHARACTER = 6.1  # width of one at font size 11
_DARK_FROM_BITS = 5.5


def draw_tree(nodes: Sequence[SearchNode]) -> str:
    """Return the tree as SVG text.

    Args:
        nodes: All nodes, root first.
    """
    num_leaves = max(node.last_leaf for node in nodes) + 1
    num_rows = max(node.depth for node in nodes) + 1
    row = 2 * _HALF + _GAP_Y
    height = num_rows * row - _GAP_Y
    root = ElementTree.Element(
        "svg", {"viewBox": f"0 0 {WIDTH:g} {height:g}", "role": "img", "class": "tree"}
    )
    scale = WIDTH / num_leaves
    for node in nodes:
        left = node.first_leaf * scale + _GAP_X / 2
        width = (node.last_leaf + 1 - node.first_leaf) * scale - _GAP_X
        _add_box(root, node, left, node.depth * row, max(width, 0.5))
    return ElementTree.tostring(root, encoding="unicode")


def _add_box(
    root: ElementTree.Element, node: SearchNode, left: float, top: float, width: float
) -> None:
    group = ElementTree.SubElement(root, "g")
    title = ElementTree.SubElement(group, "title")
    title.text = (
        f"{node.name}: weights {format_fixed(node.weight_bits)} bits, activations "
        f"{format_fixed(node.activation_bits)} bits; {node.num_configurations} configurations kept"
    )
    halves = (("W", node.weight_bits), ("A", node.activation_bits))
    for at, (letter, bits) in enumerate(halves):
        y = top + at * _HALF
        box = {"x": f"{left:.2f}", "y": f"{y:.2f}", "width": f"{width:.2f}", "height": f"{_HALF:g}"}
        ElementTree.SubElement(group, "rect", {**box, "style": f"fill: {mix_color(bits)}"})
        text = _fit(f"{node.name}  " if at == 0 else "", letter, bits, width)
        if text:
            dark = bits >= _DARK_FROM_BITS
            ink = "var(--bits-high-ink)" if dark else "var(--bits-low-ink)"
            place = {"x": f"{left + width / 2:.2f}", "y": f"{y + _HALF - 5:.2f}"}
            label = ElementTree.SubElement(group, "text", {**place, "style": f"fill: {ink}"})
            label.text = text


def _fit(name: str, letter: str, bits: float, width: float) -> str:
    """Return the longest text that fits into a box; none into a very narrow one."""
    figure = format_fixed(bits)
    for text in (f"{name}{letter} {figure}", f"{letter} {figure}", format_fixed(bits, 1)):
        if len(text) * _CHARACTER <= width - 2:
            return text
    return ""


def mix_color(bits: float) -> str:
    """Return the page's colour for an average of bits, mixed between two widths.

    >>> mix_color(3.0), mix_color(3.25)
    ('var(--bits-3)', 'color-mix(in oklab, var(--bits-3) 75%, var(--bits-4))')
    """
    bits = min(max(bits, MIN_BITS), MAX_BITS)
    low = math.floor(bits)
    share = round(100 * (1 - (bits - low)))
    if share == 100:
        return f"var(--bits-{low})"
    return f"color-mix(in oklab, var(--bits-{low}) {share}%, var(--bits-{low + 1}))"
