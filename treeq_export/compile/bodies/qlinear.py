"""The arithmetic of quant/numerics.py written as standard ONNX nodes.

Used twice: `LowerQLinear` writes it into the graph with INT4/INT8 weights, `AddFunctionBodies`
writes it into a FunctionProto that unpacks bit planes first. The form is the one that ONNX
Runtime fuses to integer arithmetic (`MatMulIntegerToFloat`):

    x' = x H;  s = step * rms(x');  Clip(x' * (1/s)) -> Q(scale 1, INT8) -> DQ -> MatMul(DQ w) -> *s

With several weight scales per channel the sums are kept apart, as MatMulInteger over groups.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

from treeq_export.compile.bodies.storage import ZeroPoints, zero_points
from treeq_export.compile.bodies.writer import BodyWriter
from treeq_export.compile.graph.signature import QLinearSignature
from treeq_export.ops import ActScale
from treeq_export.quant.grids import Cells
from treeq_export.quant.numerics import SCALE_FLOOR


def write_rotation(writer: BodyWriter, x: ir.Value, signature: QLinearSignature) -> ir.Value:
    """Append x' = x H_g."""
    group, k = signature.rotation_group, signature.in_features
    if group == 1:
        return x
    lead = [0] * (signature.rank - 1)
    grouped = writer.reshape(x, *lead, k // group, group)
    rotated = writer.op("MatMul", grouped, writer.hadamard(group))
    return writer.reshape(rotated, *lead, k)


def write_scale(writer: BodyWriter, rotated: ir.Value, signature: QLinearSignature) -> ir.Value:
    """Append s_x, (..., 1); a scalar for static scales."""
    step = max(signature.act_step, SCALE_FLOOR)
    if signature.act_scale.is_static:
        return writer.constant([step], np.float32, "act_scale")
    axes = writer.constant([-1], np.int64)
    if signature.act_scale is ActScale.TOKEN_RMS:
        square = writer.op("Mul", rotated, rotated)
        statistic = writer.op("Sqrt", writer.op("ReduceMean", square, axes, keepdims=1))
    else:
        statistic = writer.op("ReduceMax", writer.op("Abs", rotated), axes, keepdims=1)
    raw = writer.op("Mul", statistic, writer.constant(step, np.float32))
    floor = writer.constant(SCALE_FLOOR, np.float32)
    return writer.op("Max", raw, floor, label="act_scale")


def write_codes(
    writer: BodyWriter,
    rotated: ir.Value,
    scale: ir.Value,
    signature: QLinearSignature,
    zeros: ZeroPoints,
) -> ir.Value:
    """Append q_x = round(x' * (1 / s_x)), stored as `zeros` says."""
    grid, bits = signature.act_grid, signature.act_bits
    levels = writer.op("Mul", rotated, writer.op("Reciprocal", scale))
    if grid.cells is None:
        levels = _clip(writer, levels, grid.ends(bits), np.float32)
    else:
        levels = _look_up(writer, levels, grid.cells(bits))
    return writer.op("QuantizeLinear", levels, *_unit_scale(writer, zeros), label="codes")


def _look_up(writer: BodyWriter, values: ir.Value, cells: Cells) -> ir.Value:
    """Append the levels of the cells that values lie in."""
    if cells.per_unit != 1.0:
        values = writer.op("Mul", values, writer.constant(cells.per_unit, np.float32))
    cell = _clip(writer, writer.op("Floor", values), (cells.first, cells.last), np.float32)
    place = writer.op("Sub", cell, writer.constant(cells.first, np.float32))
    # NaN becomes any integer, and the table has no place for it.
    index = writer.op("Cast", place, to=ir.DataType.INT32.value)
    index = _clip(writer, index, (0, len(cells.levels) - 1), np.int32)
    return writer.op("Gather", writer.constant(cells.levels, np.float32), index)


def _clip(writer: BodyWriter, x: ir.Value, ends: tuple[int, int], dtype: Any) -> ir.Value:
    return writer.op("Clip", x, *(writer.constant(end, dtype) for end in ends))


def _unit_scale(writer: BodyWriter, zeros: ZeroPoints) -> tuple[ir.Value, ir.Value]:
    return writer.constant(1.0, np.float32), _scalar(writer, zeros.codes)


def _scalar(writer: BodyWriter, zero: np.int8 | np.uint8) -> ir.Value:
    return writer.constant(zero, zero.dtype)


def write_channel_product(
    writer: BodyWriter,
    codes: ir.Value,
    weight: ir.Value,
    weight_scale: ir.Value,
    zeros: ZeroPoints,
) -> ir.Value:
    """Append (q_x q_w^T) * s_w.

    Args:
        writer: Where to.
        codes: (..., K), stored as `zeros` says.
        weight: (K, N), likewise.
        weight_scale: (N,) float32.
        zeros: Zero points of codes and weight.
    """
    x = writer.op("DequantizeLinear", codes, *_unit_scale(writer, zeros))
    inputs = [weight, weight_scale]
    if zeros.weight:
        inputs.append(writer.row_like(weight_scale, zeros.weight))
    w = writer.op("DequantizeLinear", *inputs, axis=1)
    return writer.op("MatMul", x, w, label="product")


def write_group_product(
    writer: BodyWriter,
    codes: ir.Value,
    weight: ir.Value,
    weight_scale: ir.Value,
    signature: QLinearSignature,
    zeros: ZeroPoints,
) -> ir.Value:
    """Append sum over groups of (q_x q_w^T)_g * s_w,g.

    Args:
        writer: Where to.
        codes: (..., K), stored as `zeros` says.
        weight: (G, K/G, N), likewise.
        weight_scale: (G, 1, N) float32.
        signature: The layer's.
        zeros: Zero points of codes and weight.
    """
    rank = signature.rank
    lead = [0] * (rank - 1)
    grouped = writer.reshape(codes, *lead, signature.num_groups, signature.group_size)
    perm = [*range(rank - 2), rank - 1, rank - 2, rank]
    outer = writer.op("Transpose", grouped, perm=perm)
    operands = [outer, weight, *(_scalar(writer, zero) for zero in zeros)]
    sums = writer.op("MatMulInteger", *operands, label="product")
    scaled = writer.op("Mul", writer.op("Cast", sums, to=ir.DataType.FLOAT.value), weight_scale)
    axes = writer.constant([rank - 2], np.int64)
    return writer.op("ReduceSum", scaled, axes, keepdims=0)


def write_float_product(
    writer: BodyWriter,
    rotated: ir.Value,
    weight: ir.Value,
    weight_scale: ir.Value,
    signature: QLinearSignature,
) -> ir.Value:
    """Append x' W'^T with a dequantized weight: weight-only quantization."""
    w = writer.op("Mul", writer.op("Cast", weight, to=ir.DataType.FLOAT.value), weight_scale)
    if signature.num_groups > 1:
        w = writer.reshape(w, signature.in_features, -1)
    return writer.op("MatMul", rotated, w, label="product")


def write_qlinear(
    writer: BodyWriter,
    x: ir.Value,
    weight: ir.Value,
    weight_scale: ir.Value,
    bias: ir.Value | None,
    signature: QLinearSignature,
) -> ir.Value:
    """Append the whole layer and return y.

    Args:
        writer: Where to.
        x: (..., K) float32.
        weight: (K, N), or (G, K/G, N), stored as `zero_points` says; INT8 in weight-only layers.
        weight_scale: float32 (N,), or (G, 1, N).
        bias: (N,) or None.
        signature: The layer's.
    """
    rotated = write_rotation(writer, x, signature)
    if not signature.act_bits:
        y = write_float_product(writer, rotated, weight, weight_scale, signature)
    else:
        scale, zeros = write_scale(writer, rotated, signature), zero_points(signature)
        codes = write_codes(writer, rotated, scale, signature, zeros)
        if signature.num_groups == 1:
            product = write_channel_product(writer, codes, weight, weight_scale, zeros)
        else:
            product = write_group_product(writer, codes, weight, weight_scale, signature, zeros)
        y = writer.op("Mul", product, scale)
    return y if bias is None else writer.op("Add", y, bias)
