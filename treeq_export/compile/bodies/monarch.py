"""`treeq::Monarch` in standard ONNX."""

import numpy as np
import onnx_ir as ir

from treeq_export.compile.bodies.writer import BodyWriter


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
        writer: Records the nodes.
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
