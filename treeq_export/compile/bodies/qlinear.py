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


class QLinearBody:
    """Writes one quantized linear, as a whole or step by step.

    x and x' are (..., K), activation codes too; a weight is (K, N) with its scales (N,), or with
    several of them per channel (G, K/G, N) with (G, 1, N). Scales are float32.

    Args:
        writer: Records the nodes.
        signature: Formats and sizes of the layer.
        zeros: Storage of the codes; None is what `zero_points` says.
    """

    def __init__(
        self, writer: BodyWriter, signature: QLinearSignature, zeros: ZeroPoints | None = None
    ) -> None:
        self._writer = writer
        self._form = signature
        self.zeros = zero_points(signature) if zeros is None else zeros

    def rotate(self, x: ir.Value) -> ir.Value:
        """Append x' = x H_g."""
        group, k = self._form.rotation_group, self._form.in_features
        if group == 1:
            return x
        lead = [0] * (self._form.rank - 1)
        grouped = self._writer.reshape(x, *lead, k // group, group)
        rotated = self._writer.op("MatMul", grouped, self._writer.hadamard(group))
        return self._writer.reshape(rotated, *lead, k)

    def scale(self, rotated: ir.Value) -> ir.Value:
        """Append s_x, (..., 1); a scalar for static scales."""
        op, constant = self._writer.op, self._writer.constant
        step = max(self._form.act_step, SCALE_FLOOR)
        if self._form.act_scale.is_static:
            return constant([step], np.float32, "act_scale")
        axes = constant([-1], np.int64)
        if self._form.act_scale is ActScale.TOKEN_RMS:
            statistic = op("Sqrt", op("ReduceMean", op("Mul", rotated, rotated), axes, keepdims=1))
        else:
            statistic = op("ReduceMax", op("Abs", rotated), axes, keepdims=1)
        raw = op("Mul", statistic, constant(step, np.float32))
        return op("Max", raw, constant(SCALE_FLOOR, np.float32), label="act_scale")

    def codes(self, rotated: ir.Value, scale: ir.Value) -> ir.Value:
        """Append q_x = round(x' * (1 / s_x)), to the grid's levels, plus the zero point."""
        grid, bits = self._form.act_grid, self._form.act_bits
        levels = self._writer.op("Mul", rotated, self._writer.op("Reciprocal", scale))
        if grid.cells is None:
            levels = self._clip(levels, grid.ends(bits), np.float32)
        else:
            levels = self._look_up(levels, grid.cells(bits))
        return self._writer.op("QuantizeLinear", levels, *self._unit_scale(), label="codes")

    def _look_up(self, values: ir.Value, cells: Cells) -> ir.Value:
        """Append the levels of the cells that values lie in."""
        op, constant = self._writer.op, self._writer.constant
        if cells.per_unit != 1.0:
            values = op("Mul", values, constant(cells.per_unit, np.float32))
        cell = self._clip(op("Floor", values), (cells.first, cells.last), np.float32)
        place = op("Sub", cell, constant(cells.first, np.float32))
        # NaN becomes any integer, and the table has no place for it.
        index = op("Cast", place, to=ir.DataType.INT32.value)
        index = self._clip(index, (0, len(cells.levels) - 1), np.int32)
        return op("Gather", constant(cells.levels, np.float32), index)

    def _clip(self, x: ir.Value, ends: tuple[int, int], dtype: Any) -> ir.Value:
        return self._writer.op("Clip", x, *(self._writer.constant(end, dtype) for end in ends))

    def _unit_scale(self) -> tuple[ir.Value, ir.Value]:
        return self._writer.constant(1.0, np.float32), self._scalar(self.zeros.codes)

    def _scalar(self, zero: np.int8 | np.uint8) -> ir.Value:
        return self._writer.constant(zero, zero.dtype)

    def channel_product(self, codes: ir.Value, weight: ir.Value, scale: ir.Value) -> ir.Value:
        """Append (q_x q_w^T) * s_w, with one weight scale per channel."""
        x = self._writer.op("DequantizeLinear", codes, *self._unit_scale())
        inputs = [weight, scale]
        if self.zeros.weight:
            inputs.append(self._writer.row_like(scale, self.zeros.weight))
        w = self._writer.op("DequantizeLinear", *inputs, axis=1)
        return self._writer.op("MatMul", x, w, label="product")

    def _group_product(self, codes: ir.Value, weight: ir.Value, scale: ir.Value) -> ir.Value:
        """Append sum over groups of (q_x q_w^T)_g * s_w,g."""
        op, rank = self._writer.op, self._form.rank
        lead = [0] * (rank - 1)
        sizes = (self._form.num_groups, self._form.group_size)
        grouped = self._writer.reshape(codes, *lead, *sizes)
        outer = op("Transpose", grouped, perm=[*range(rank - 2), rank - 1, rank - 2, rank])
        zeros = [self._scalar(zero) for zero in self.zeros]
        sums = op("MatMulInteger", outer, weight, *zeros, label="product")
        scaled = op("Mul", op("Cast", sums, to=ir.DataType.FLOAT.value), scale)
        return op("ReduceSum", scaled, self._writer.constant([rank - 2], np.int64), keepdims=0)

    def _float_product(self, rotated: ir.Value, weight: ir.Value, scale: ir.Value) -> ir.Value:
        """Append x' W'^T with a dequantized weight: weight-only quantization."""
        op = self._writer.op
        w = op("Mul", op("Cast", weight, to=ir.DataType.FLOAT.value), scale)
        if self._form.num_groups > 1:
            w = self._writer.reshape(w, self._form.in_features, -1)
        return op("MatMul", rotated, w, label="product")

    def write(
        self, x: ir.Value, weight: ir.Value, weight_scale: ir.Value, bias: ir.Value | None
    ) -> ir.Value:
        """Append the whole layer and return y (..., N); the bias is (N,)."""
        rotated = self.rotate(x)
        if not self._form.act_bits:
            y = self._float_product(rotated, weight, weight_scale)
        else:
            scale = self.scale(rotated)
            codes = self.codes(rotated, scale)
            grouped = self._form.num_groups > 1
            product = self._group_product if grouped else self.channel_product
            y = self._writer.op("Mul", product(codes, weight, weight_scale), scale)
        return y if bias is None else self._writer.op("Add", y, bias)
