"""Pass `LowerMonarch`: `treeq::Monarch` to standard ONNX.

Rules:
1. A 1 x 1 grid (plain low rank) is two MatMuls with the factors squeezed to matrices.
2. Any other grid is two batched MatMuls, the blocks as batch:
   x -> (b_in, M, K/b_in) @ R -> (b_out, M, b_in*r) @ L -> (..., N).
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from treeq_export.compile.bodies.qlinear import BodyWriter
from treeq_export.compile.graph.signature import MONARCH, layer_name, nodes_of
from treeq_export.compile.passes.lower_qlinear import (
    add_initializer,
    initializer_array,
    replace_node,
)


class LowerMonarch(InPlacePass):
    """Rewrite every `treeq::Monarch` of the graph; ensures that none is left."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the graph in place."""
        nodes = nodes_of(model, MONARCH)
        for node in nodes:
            _lower(model.graph, node)
        return PassResult(model, bool(nodes))


def _lower(graph: ir.Graph, node: ir.Node) -> None:
    x, r_value, l_value = node.inputs
    assert x is not None
    assert r_value is not None
    assert l_value is not None
    r_factor, l_factor = initializer_array(r_value), initializer_array(l_value)
    name = layer_name(node)
    writer = BodyWriter(f"{name}/branch/")
    if len(r_factor) == 1 and len(l_factor) == 1:
        z = writer.op("MatMul", x, add_initializer(graph, f"{name}.branch.R_matrix", r_factor[0]))
        y = writer.op("MatMul", z, add_initializer(graph, f"{name}.branch.L_matrix", l_factor[0]))
    else:
        y = write_monarch(writer, x, r_value, l_value, r_factor.shape, l_factor.shape)
    replace_node(graph, node, writer, y)


def write_monarch(
    writer: BodyWriter,
    x: ir.Value,
    r_value: ir.Value,
    l_value: ir.Value,
    r_shape: tuple[int, ...],
    l_shape: tuple[int, ...],
) -> ir.Value:
    """Append M x by batched matrix products over the blocks.

    Args:
        writer: Where to.
        x: (..., K).
        r_value: R, of shape `r_shape` (b_in, K/b_in, b_out*r).
        l_value: L, of shape `l_shape` (b_out, b_in*r, N/b_out).
        r_shape: See above.
        l_shape: See above.
    """
    b_in, block_in, _ = r_shape
    b_out, inner, block_out = l_shape

    def shaped(value: ir.Value, *shape: int) -> ir.Value:
        return writer.op("Reshape", value, writer.constant(shape, np.int64))

    tokens = writer.op("Transpose", shaped(x, -1, b_in, block_in), perm=[1, 0, 2])
    z = writer.op("MatMul", tokens, r_value)
    grid = writer.op("Transpose", shaped(z, b_in, -1, b_out, inner // b_in), perm=[2, 1, 0, 3])
    blocks = writer.op("MatMul", shaped(grid, b_out, -1, inner), l_value)
    rows = writer.op("Transpose", blocks, perm=[1, 0, 2])
    lead = writer.op(
        "Slice",
        writer.op("Shape", x),
        writer.constant([0], np.int64),
        writer.constant([-1], np.int64),
    )
    shape = writer.op("Concat", lead, writer.constant([b_out * block_out], np.int64), axis=0)
    return writer.op("Reshape", rows, shape)
