"""Pass `MergeSiblings`: linears with one input become one wide linear with several outputs.

Rules:
1. Two or three packed nodes that read the same x, with equal weight bits, activation format and
   step, rotation group, group size and output features, a multiple of 32, become one
   FusedQLinear: planes, scales and biases stacked along the output channels, one output each.
2. Branches with equal factor shapes are stacked as further blocks of outputs: the grid
   (b_in, b_out) becomes (b_in, 2 b_out) or (b_in, 3 b_out). Unequal ones are not merged.
3. Each layer's site then names the shared node and its output channels in it.

So q, k and v rotate and quantize their input once.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
import onnx_ir as ir

from treeq_export.compile.graph.contract import RewritePass
from treeq_export.compile.graph.fused import (
    MAX_OUTPUTS,
    hides_input,
    hides_output,
    packed_nodes,
    widen,
)
from treeq_export.compile.graph.match import constant_of
from treeq_export.compile.graph.rewrite import add_initializer
from treeq_export.compile.graph.sites import read_layers, write_layers
from treeq_export.runners.plain_layer import input_of

_TILE = 32
# How the siblings' arrays are joined: what the new one is called, and the axis of output channels.
_JOINED = {
    "planes": ("planes", 1),
    "weight_scale": ("weight_scale", 0),
    "bias": ("bias", 0),
    "branch_R": ("branch.R", 2),
    "branch_L": ("branch.L", 0),
}


class MergeSiblings(RewritePass[list[ir.Node]]):
    """Merge siblings; no two mergeable nodes read the same value."""

    def _find(self, model: ir.Model) -> Iterator[list[ir.Node]]:
        readers: dict[ir.Value | None, list[ir.Node]] = {}
        for node in packed_nodes(model):
            readers.setdefault(input_of(node, "x"), []).append(node)
        for siblings in readers.values():
            by_format = sorted(siblings, key=lambda node: repr(_format(node)))
            for key, group in groupby(by_format, key=_format):
                alike = sorted(group, key=siblings.index)
                if key is not None and 2 <= len(alike) <= MAX_OUTPUTS:
                    yield alike

    def _rewrite(self, model: ir.Model, found: list[ir.Node]) -> None:
        first, *others = found
        names = [first.name or "", *((node.name or "").split(".")[-1] for node in others)]
        name = "+".join(names)
        inputs: dict[str, ir.Value | None] = {}
        for part, (suffix, axis) in _JOINED.items():
            if input_of(first, part) is not None:
                arrays = [constant_of(input_of(node, part)) for node in found]
                joined = np.concatenate(arrays, axis=axis)
                inputs[part] = add_initializer(model.graph, f"model.{name}.{suffix}", joined)
        size = first.attributes["out_features"].as_int()
        outputs = [node.outputs[0] for node in found]
        # What reads the first one's output may stand before the other siblings.
        wide = widen(model.graph, first, inputs, outputs, at=first, out_features=size * len(found))
        wide.name = name
        _share_node(model, found, wide, size)


def _format(node: ir.Node) -> tuple[Any, ...] | None:
    """Return what siblings have to agree in; None where the node cannot be merged."""
    if node.attributes["out_features"].as_int() % _TILE or len(node.outputs) > 1:
        return None
    if hides_input(node) or hides_output(node):
        return None  # those are one's own
    arrays = [constant_of(input_of(node, part)) for part in _JOINED]
    shapes = tuple(None if array is None else tuple(array.shape) for array in arrays)
    attributes = tuple(sorted((name, str(a.value)) for name, a in node.attributes.items()))
    return shapes, attributes


def _share_node(model: ir.Model, nodes: list[ir.Node], wide: ir.Node, size: int) -> None:
    """Let the sites of the siblings name the node that they share, and their channels in it."""
    offsets = {node.name: index * size for index, node in enumerate(nodes)}
    sites = [
        site._replace(node=wide.name, offset=offsets[site.node], size=size)
        if site.node in offsets
        else site
        for site in read_layers(model)
    ]
    write_layers(model, sites)
