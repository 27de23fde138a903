"""Pass `FuseModulate`: adaLN's normalisation and modulation into the linear that reads them.

Rules:
1. LayerNormalization over the last axis with a scale of ones and no bias, times
   (1 + Unsqueeze(scale)), plus Unsqueeze(shift), scale and shift (batch, K), read by one packed
   node only, becomes that node's norm_scale, norm_shift and norm_epsilon.
2. The sites of its layers have no input value any more.
"""

from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from treeq_export.compile.graph.fused import (
    NORM_SCALE,
    NORM_SHIFT,
    X,
    constant_of,
    forget_values,
    input_of,
    only_user,
    packed_nodes,
    widen,
)

_RANK = 3  # (batch, tokens, K)


class FuseModulate(InPlacePass):
    """Fuse modulations; ensures that none with a single reader is left before a packed node."""

    def call(self, model: ir.Model) -> PassResult:
        """Change the graph in place."""
        fused = set()
        for node in packed_nodes(model):
            found = find_modulation(input_of(node, X))
            if found is None or input_of(node, NORM_SCALE) is not None:
                continue
            inputs = {X: found.x, NORM_SCALE: found.scale, NORM_SHIFT: found.shift}
            name, outputs = node.name, list(node.outputs)
            new = widen(model.graph, node, inputs, outputs, norm_epsilon=found.epsilon)
            new.name = name
            fused.add(name)
        forget_values(model, fused, input="")
        RemoveUnusedNodesPass()(model)  # what was fused still reads its inputs
        return PassResult(model, bool(fused))


class Modulation(NamedTuple):
    """LayerNormalization(x) * (1 + scale) + shift."""

    x: ir.Value
    scale: ir.Value
    shift: ir.Value
    epsilon: float


def find_modulation(value: ir.Value | None) -> Modulation | None:
    """Return the modulation that computes a value for one reader, None where there is none."""
    shifted = producer_of(value, "Add")
    if value is None or shifted is None or only_user(value) is None:
        return None
    for product, shift in both_ways(shifted):
        scaled = producer_of(product, "Mul")
        shift_row = unsqueezed(shift)
        if scaled is None or shift_row is None or only_user(scaled.outputs[0]) is not shifted:
            continue
        for normalised, factor in both_ways(scaled):
            norm, scale_row = _norm(normalised, scaled), _one_plus(factor)
            if norm is not None and scale_row is not None:
                x = norm.inputs[0]
                assert x is not None
                if not (is_row_of(scale_row, x) and is_row_of(shift_row, x)):
                    continue
                # As a file holds it: the name of the function body must not depend on a save.
                epsilon = np.float32(norm.attributes.get_float("epsilon", 1e-5))
                return Modulation(x, scale_row, shift_row, float(epsilon))
    return None


def producer_of(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the standard node of that type which computes a value, None where there is none."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and not node.domain else None


def both_ways(node: ir.Node) -> list[tuple[ir.Value | None, ir.Value | None]]:
    """Return both orders of a commutative node's inputs."""
    first, second = node.inputs
    return [(first, second), (second, first)]


def _norm(value: ir.Value | None, reader: ir.Node) -> ir.Node | None:
    """Return the LayerNormalization without affine part that computes a value for one reader."""
    node = producer_of(value, "LayerNormalization")
    if node is None or value is None or only_user(value) is not reader:
        return None
    x = node.inputs[0]
    rank = len(x.shape) if x is not None and x.shape is not None else 0
    weight = constant_of(node.inputs[1])
    plain = weight is not None and bool(np.all(weight == 1)) and input_of(node, 2) is None
    last = node.attributes.get_int("axis", -1) in (-1, rank - 1)
    return node if rank == _RANK and plain and last else None


def unsqueezed(value: ir.Value | None) -> ir.Value | None:
    """Return the (batch, K) value whose Unsqueeze on axis 1 this is."""
    node = producer_of(value, "Unsqueeze")
    if node is None:
        return None
    axes, source = constant_of(node.inputs[1]), node.inputs[0]
    if axes is None or axes.reshape(-1).tolist() != [1]:
        return None
    return (
        source
        if source is not None and source.shape is not None and len(source.shape) == 2
        else None
    )


def is_row_of(row: ir.Value, x: ir.Value) -> bool:
    """Whether a row has one entry for each image and channel of x (batch, tokens, channels)."""
    if row.shape is None or x.shape is None or len(x.shape) != _RANK:
        return False
    return list(row.shape) == [x.shape[0], x.shape[-1]]


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
