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

from itertools import groupby
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from treeq_export.compile.graph.fused import (
    BIAS,
    BRANCH_L,
    BRANCH_R,
    GATE,
    MAX_OUTPUTS,
    NORM_SCALE,
    PLANES,
    WEIGHT_SCALE,
    X,
    constant_of,
    input_of,
    packed_nodes,
    widen,
)
from treeq_export.compile.passes.lower_qlinear import add_initializer
from treeq_export.runners.graph_meta import read_layers, write_layers

_TILE = 32
# How the siblings' arrays are joined: axis of the output channels.
_AXES = {PLANES: 1, WEIGHT_SCALE: 0, BIAS: 0, BRANCH_R: 2, BRANCH_L: 0}
_NAMES = {
    PLANES: "planes",
    WEIGHT_SCALE: "weight_scale",
    BIAS: "bias",
    BRANCH_R: "branch.R",
    BRANCH_L: "branch.L",
}


class MergeSiblings(InPlacePass):
    """Merge siblings; ensures that no two mergeable nodes read the same value."""

    def call(self, model: ir.Model) -> PassResult:
        """Change the graph in place."""
        modified = False
        nodes = packed_nodes(model)
        readers: dict[ir.Value, list[ir.Node]] = {}
        for node in nodes:
            x = input_of(node, X)
            assert x is not None
            readers.setdefault(x, []).append(node)
        for siblings in readers.values():
            by_format = sorted(siblings, key=lambda node: repr(_format(node)))
            for key, group in groupby(by_format, key=_format):
                alike = sorted(group, key=siblings.index)
                if key is not None and 2 <= len(alike) <= MAX_OUTPUTS:
                    _merge(model, alike)
                    modified = True
        RemoveUnusedNodesPass()(model)  # what was fused still reads its inputs
        return PassResult(model, modified)


def _format(node: ir.Node) -> tuple[Any, ...] | None:
    """Return what siblings have to agree in; None where the node cannot be merged."""
    if node.attributes["out_features"].as_int() % _TILE or len(node.outputs) > 1:
        return None
    if any(input_of(node, position) is not None for position in (NORM_SCALE, GATE)):
        return None  # those are one's own
    shapes = tuple(
        None if (value := input_of(node, position)) is None else tuple(constant_of(value).shape)
        for position in _AXES
    )
    attributes = tuple(sorted((name, str(a.value)) for name, a in node.attributes.items()))
    return shapes, attributes


def _merge(model: ir.Model, nodes: list[ir.Node]) -> None:
    name = "+".join(
        [nodes[0].name or "", *((node.name or "").split(".")[-1] for node in nodes[1:])]
    )
    inputs: dict[int, ir.Value | None] = {}
    for position, axis in _AXES.items():
        values = [input_of(node, position) for node in nodes]
        if values[0] is None:
            continue
        joined = np.concatenate([constant_of(value) for value in values], axis=axis)
        value = f"model.{name}.{_NAMES[position]}"
        inputs[position] = add_initializer(model.graph, value, joined)
    size = nodes[0].attributes["out_features"].as_int()
    outputs = [node.outputs[0] for node in nodes]
    first = nodes[0]  # what reads its output may stand before the other siblings
    out_features = size * len(nodes)
    merged = widen(model.graph, first, inputs, outputs, at=first, out_features=out_features)
    merged.name = name
    offsets = {node.name: index * size for index, node in enumerate(nodes)}
    sites = [
        site._replace(node=name, offset=offsets[site.node], size=size)
        if site.node in offsets
        else site
        for site in read_layers(model)
    ]
    write_layers(model, sites)
