"""Pass `FuseModulate`: adaLN's normalisation and modulation into the linear that reads them.

Rules:
1. LayerNormalization over the last axis with a scale of ones and no bias, times
   (1 + Unsqueeze(scale)), plus Unsqueeze(shift), scale and shift (batch, K), read by one packed
   node only, becomes that node's norm_scale, norm_shift and norm_epsilon.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from treeq_export.compile.graph.contract import RewritePass
from treeq_export.compile.graph.fused import (
    hides_input,
    packed_nodes,
    widen,
)
from treeq_export.compile.graph.match import (
    RANK,
    both_ways,
    constant_of,
    is_row_of,
    only_user,
    producer_of,
    unsqueezed,
)
from treeq_export.runners.plain_layer import input_of


class Modulation(NamedTuple):
    """What a node reads: LayerNormalization(x) * (1 + scale) + shift."""

    node: ir.Node
    x: ir.Value
    scale: ir.Value
    shift: ir.Value
    epsilon: float


class FuseModulate(RewritePass[Modulation]):
    """Fuse modulations; none with a single reader is left before a packed node."""

    def _find(self, model: ir.Model) -> Iterator[Modulation]:
        for node in packed_nodes(model):
            if not hides_input(node):
                yield from _find_modulation(node)

    def _rewrite(self, model: ir.Model, found: Modulation) -> None:
        inputs = {"x": found.x, "norm_scale": found.scale, "norm_shift": found.shift}
        outputs = list(found.node.outputs)
        widen(model.graph, found.node, inputs, outputs, norm_epsilon=found.epsilon)


def _find_modulation(node: ir.Node) -> Iterator[Modulation]:
    """Yield the modulation that computes x for this reader alone, if any."""
    value = input_of(node, "x")
    shifted = producer_of(value, "Add")
    if value is None or shifted is None or only_user(value) is None:
        return
    for product, shift in both_ways(shifted):
        scaled, shift_row = producer_of(product, "Mul"), unsqueezed(shift)
        if scaled is None or shift_row is None or only_user(scaled.outputs[0]) is not shifted:
            continue
        for normalised, factor in both_ways(scaled):
            norm, scale_row = _norm(normalised, scaled), _one_plus(factor)
            x = None if norm is None else norm.inputs[0]
            if norm is None or x is None or scale_row is None:
                continue
            if is_row_of(scale_row, x) and is_row_of(shift_row, x):
                # As a file holds it: the name of the function body must not depend on a save.
                epsilon = np.float32(norm.attributes.get_float("epsilon", 1e-5))
                yield Modulation(node, x, scale_row, shift_row, float(epsilon))
                return


def _norm(value: ir.Value | None, reader: ir.Node) -> ir.Node | None:
    """Return the LayerNormalization without affine part that computes a value for one reader."""
    node = producer_of(value, "LayerNormalization")
    if node is None or value is None or only_user(value) is not reader:
        return None
    x = node.inputs[0]
    rank = len(x.shape) if x is not None and x.shape is not None else 0
    weight = constant_of(node.inputs[1])
    plain = weight is not None and bool(np.all(weight == 1)) and node.inputs[2:] in ((), (None,))
    last = node.attributes.get_int("axis", -1) in (-1, rank - 1)
    return node if rank == RANK and plain and last else None


def _one_plus(value: ir.Value | None) -> ir.Value | None:
    """Return the (batch, K) value v where this is 1 + Unsqueeze(v)."""
    node = producer_of(value, "Add")
    if node is None:
        return None
    for row, one in both_ways(node):
        constant = constant_of(one)
        if constant is not None and constant.size == 1 and float(constant.reshape(-1)[0]) == 1:
            return unsqueezed(row)
    return None
