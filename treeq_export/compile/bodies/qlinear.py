"""The arithmetic of quant/numerics.py written as standard ONNX nodes.

Used twice: `LowerQLinear` writes it into the graph with INT4/INT8 weights, `AddFunctionBodies`
writes it into a FunctionProto that unpacks bit planes first. The form is the one that ONNX
Runtime fuses to integer arithmetic (`MatMulIntegerToFloat`):

    x' = x H;  s = step * rms(x');  Clip(x' * (1/s)) -> Q(scale 1, INT8) -> DQ -> MatMul(DQ w) -> *s

With several weight scales per channel the sums are kept apart, as MatMulInteger over groups.

x86 processors without VNNI add pairs of products of UINT8 activations and INT8 weights in 16 bits,
with saturation, and runtimes there turn INT8 activations of Q/DQ into UINT8 by adding 128. Arm
processors without dot products add pairs of INT8 times INT8 in 16 bits, where only two times
-128 * -128 overflows, and ONNX Runtime there turns UINT8 activations into INT8 by subtracting 128.
Codes and weights are therefore stored with zero points that keep each pair within 16 bits, see
`zero_points`; UINT8 times UINT8 is never added in 16 bits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from treeq_export.compile.graph.signature import QLinearSignature
from treeq_export.ops import MAX_BITS, PACK_WORD, ActScale
from treeq_export.quant.numerics import SCALE_FLOOR, code_range
from treeq_export.quant.rotation import hadamard


class BodyWriter:
    """Records nodes under a common name prefix.

    Args:
        prefix: Put before every node and value name, such as "transformer_blocks.0.ff.net.2/".
        shared: Returns the value of a large constant by name, or None to write it as a node.
    """

    def __init__(
        self,
        prefix: str = "",
        shared: Callable[[str, NDArray[Any]], ir.Value] | None = None,
    ) -> None:
        self.tape = ir.tape.Tape()
        self.prefix = prefix
        self._shared = shared
        self._count = 0

    def op(self, op_type: str, *inputs: ir.Value, label: str = "", **attributes: Any) -> ir.Value:
        """Append a node and return its output.

        Args:
            op_type: Standard ONNX operator.
            *inputs: Its inputs.
            label: Name of node and value after the prefix; the operator and a number if empty.
            **attributes: Its attributes.
        """
        name = f"{self.prefix}{label or f'{op_type}_{self._count}'}"
        self._count += 1
        value = self.tape.op(op_type, inputs, attributes, name=name)
        value.name = name
        return value

    def split(self, value: ir.Value, count: int) -> list[ir.Value]:
        """Append a Split of the last axis into equal parts."""
        attributes = {"axis": -1, "num_outputs": count}
        name = f"{self.prefix}Split"
        return list(
            self.tape.op_multi_out("Split", [value], attributes, num_outputs=count, name=name)
        )

    def constant(self, array: Any, dtype: Any, label: str = "") -> ir.Value:
        """Append a Constant node."""
        tensor = ir.tensor(np.asarray(array, dtype=dtype))
        return self.op("Constant", label=label, value=tensor)

    def row_like(self, row: ir.Value, number: np.generic) -> ir.Value:
        """Return (N,) of one number, as long as `row`, for a runtime to fold.

        A function body does not know N, in which the layers that share it differ.
        """
        if row.const_value is not None:
            return self.constant(np.full(row.const_value.shape.numpy(), number), number.dtype)
        shape = self.op("Shape", row)
        return self.op("ConstantOfShape", shape, value=ir.tensor(np.full(1, number)))

    def hadamard(self, matrix: NDArray[np.float32]) -> ir.Value:
        """Return the rotation matrix, shared between layers where the graph allows it.

        A function body holds its signs as INT8, a quarter of the size, for a runtime to fold.
        """
        if self._shared is not None:
            return self._shared(f"treeq.hadamard_{len(matrix)}", matrix)
        signs = self.op("Cast", self.constant(np.sign(matrix), np.int8), to=ir.DataType.FLOAT.value)
        return self.op("Mul", signs, self.constant(matrix[0, 0], np.float32), label="hadamard")


def _reshape(writer: BodyWriter, x: ir.Value, *shape: int, label: str = "") -> ir.Value:
    """Append a Reshape; 0 copies an axis."""
    return writer.op("Reshape", x, writer.constant(shape, np.int64), label=label)


def write_rotation(
    writer: BodyWriter, x: ir.Value, signature: QLinearSignature, matrix: NDArray[np.float32]
) -> ir.Value:
    """Append x' = x H_g."""
    group, k = signature.rotation_group, signature.in_features
    if group == 1:
        return x
    lead = [0] * (signature.rank - 1)
    grouped = _reshape(writer, x, *lead, k // group, group)
    rotated = writer.op("MatMul", grouped, writer.hadamard(matrix))
    return _reshape(writer, rotated, *lead, k)


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


class ZeroPoints(NamedTuple):
    """How codes are stored: plus a zero point, in its type.

    Attributes:
        codes: int8 0, or uint8, of activation codes.
        weight: int8 0, or uint8, of weight codes.
    """

    codes: np.int8 | np.uint8
    weight: np.int8 | np.uint8


# Both operands INT8: the only form that TensorRT takes. It saturates with 8-bit weights on x86
# without VNNI, unless a runtime multiplies INT8 by INT8.
SIGNED = ZeroPoints(np.int8(0), np.int8(0))
_LEAST_PAIR = 32768  # its absolute value; the largest, 32767, belongs to the weight -least - 1


def zero_points(signature: QLinearSignature) -> ZeroPoints:
    """Return the fastest storage of a layer's codes that no runtime multiplies with saturation.

    INT8 with scales per channel and weights of at most 7 bits: 2 * 255 * 64 fits in 16 bits. Else
    the activation codes are UINT8 from 1 upwards (from 0 at 8 bits: 0 becomes -128 in INT8), and so
    are the weights where a pair of products does not fit, which is W8A8 only. MatMulInteger of INT8
    and INT8 would be exact on x86 as well, and 3 to 10 times slower in ONNX Runtime.

    Args:
        signature: The layer's; SIGNED for weight-only ones.
    """
    (least, _), is_float = code_range(signature.weight_bits), not signature.act_bits
    if is_float or (signature.num_groups == 1 and 2 * 255 * -least <= _LEAST_PAIR):
        return SIGNED
    qmin, qmax = code_range(signature.act_bits)
    codes = np.uint8(-qmin + (signature.act_bits < MAX_BITS))
    fits = 2 * (qmax + int(codes)) * -least <= _LEAST_PAIR
    return ZeroPoints(codes, np.int8(0) if fits else np.uint8(-least))


def write_codes(
    writer: BodyWriter,
    rotated: ir.Value,
    scale: ir.Value,
    signature: QLinearSignature,
    zeros: ZeroPoints,
) -> ir.Value:
    """Append q_x = clip(rint(x' * (1 / s_x))), stored as `zeros` says."""
    qmin, qmax = code_range(signature.act_bits)
    scaled = writer.op("Mul", rotated, writer.op("Reciprocal", scale))
    clipped = writer.op(
        "Clip", scaled, writer.constant(qmin, np.float32), writer.constant(qmax, np.float32)
    )
    return writer.op("QuantizeLinear", clipped, *_unit_scale(writer, zeros), label="codes")


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
    grouped = _reshape(writer, codes, *lead, signature.num_groups, signature.group_size)
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
        w = _reshape(writer, w, signature.in_features, -1)
    return writer.op("MatMul", rotated, w, label="product")


_BYTE_BITS = 8
_BYTES = PACK_WORD // _BYTE_BITS


def plane_table(plane: int, bits: int, zero: np.int8 | np.uint8 = SIGNED.weight) -> NDArray[Any]:
    """Return what a byte of a plane adds to the stored codes of its eight weights.

    Or-ing the entries of all planes gives the code in two's complement: the highest plane brings
    the sign extension where its bit is 0. With the zero point 2^(bits - 1), the planes are the bits
    of the stored codes.

    Args:
        plane: 0..bits - 1.
        bits: Bits per code.
        zero: The zero point, 0 or 2^(bits - 1).

    Returns:
        (256, 8), the type of `zero`.

    >>> plane_table(1, 2)[0b01].tolist()
    [0, -2, -2, -2, -2, -2, -2, -2]
    """
    set_bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    if plane == bits - 1 and not zero:
        return np.where(set_bits, 0, -(1 << plane)).astype(zero.dtype)
    return (set_bits << plane).astype(zero.dtype)


def write_unpacked_weight(
    writer: BodyWriter, planes: ir.Value, signature: QLinearSignature
) -> ir.Value:
    """Append the unpacking of bit planes (bits, N, K/32) to stored codes (K, N), or (G, K/G, N).

    A byte of a plane is looked up in a table of eight codes. No value takes more than four bytes a
    weight, so a runtime that folds all layers at load, or unpacks at each call, can afford it.
    """
    bits, k = signature.weight_bits, signature.in_features
    zero = zero_points(signature).weight
    words = writer.op("Cast", planes, to=ir.DataType.UINT32.value)
    column = writer.op("Unsqueeze", words, writer.constant([-1], np.int64))
    shifts = writer.constant(np.arange(_BYTES) * _BYTE_BITS, np.uint32)
    shifted = writer.op("BitShift", column, shifts, direction="RIGHT")
    masked = writer.op("BitwiseAnd", shifted, writer.constant(255, np.uint32))
    index = writer.op("Cast", masked, to=ir.DataType.INT32.value)  # (bits, N, words, 4)
    codes = None
    for plane in range(bits):
        bytes_ = writer.op("Gather", index, writer.constant(plane, np.int64), axis=0)
        table = writer.constant(plane_table(plane, bits, zero), zero.dtype)
        part = writer.op("Gather", table, bytes_, axis=0)  # (N, words, 4, 8)
        codes = part if codes is None else writer.op("BitwiseOr", codes, part)
    assert codes is not None
    flat = _reshape(writer, codes, 0, -1)
    if k % PACK_WORD:
        flat = writer.op(
            "Slice",
            flat,
            writer.constant([0], np.int64),
            writer.constant([k], np.int64),
            writer.constant([1], np.int64),
        )
    perm = [1, 0]
    if signature.num_groups > 1:
        turned = writer.op("Transpose", flat, perm=perm)
        return _reshape(
            writer, turned, signature.num_groups, signature.group_size, -1, label="weight_quantized"
        )
    return writer.op("Transpose", flat, perm=perm, label="weight_quantized")


def write_function_scale(
    writer: BodyWriter, weight_scale: ir.Value, signature: QLinearSignature
) -> ir.Value:
    """Append the reordering of scales (N, G) to (N,), or (G, 1, N)."""
    if signature.num_groups == 1:
        return _reshape(writer, weight_scale, -1)
    turned = writer.op("Transpose", weight_scale, perm=[1, 0])
    return writer.op("Unsqueeze", turned, writer.constant([1], np.int64))


def write_qlinear(
    writer: BodyWriter,
    x: ir.Value,
    weight: ir.Value,
    weight_scale: ir.Value,
    bias: ir.Value | None,
    signature: QLinearSignature,
    matrix: NDArray[np.float32],
) -> ir.Value:
    """Append the whole layer and return y.

    Args:
        writer: Where to.
        x: (..., K) float32.
        weight: (K, N), or (G, K/G, N), stored as `zero_points` says; INT8 in weight-only layers.
        weight_scale: float32 (N,), or (G, 1, N).
        bias: (N,) or None.
        signature: The layer's.
        matrix: Hadamard matrix of the rotation group.
    """
    rotated = write_rotation(writer, x, signature, matrix)
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


def write_packed(
    writer: BodyWriter,
    x: ir.Value,
    planes: ir.Value,
    weight_scale: ir.Value,
    bias: ir.Value | None,
    signature: QLinearSignature,
) -> ir.Value:
    """Append a layer whose weight comes as bit planes, and return y: the body of `treeq::QLinear`.

    Args:
        writer: Where to.
        x: (..., K) float32.
        planes: (bits, N, ceil(K / 32)) INT32.
        weight_scale: (N, G) float32.
        bias: (N,) or None.
        signature: The layer's.
    """
    return write_qlinear(
        writer,
        x,
        write_unpacked_weight(writer, planes, signature),
        write_function_scale(writer, weight_scale, signature),
        bias,
        signature,
        hadamard(signature.rotation_group).astype(np.float32),
    )
