"""A layer whose weight comes as bit planes: the body of `treeq::QLinear`."""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from treeq_export.compile.bodies.qlinear import QLinearBody
from treeq_export.compile.bodies.storage import SIGNED, zero_points
from treeq_export.compile.bodies.writer import BodyWriter
from treeq_export.compile.graph.signature import QLinearSignature
from treeq_export.ops import PACK_WORD

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


def _write_weight(writer: BodyWriter, planes: ir.Value, signature: QLinearSignature) -> ir.Value:
    """Append the unpacking of bit planes (bits, N, K/32) to stored codes (K, N), or (G, K/G, N).

    A byte of a plane is looked up in a table of eight codes. No value takes more than four bytes a
    weight, so a runtime that folds all layers at load, or unpacks at each call, can afford it.
    """
    op, constant = writer.op, writer.constant
    bits, k = signature.weight_bits, signature.in_features
    zero = zero_points(signature).weight
    words = op("Cast", planes, to=ir.DataType.UINT32.value)
    column = op("Unsqueeze", words, constant([-1], np.int64))
    shifts = constant(np.arange(_BYTES) * _BYTE_BITS, np.uint32)
    shifted = op("BitShift", column, shifts, direction="RIGHT")
    masked = op("BitwiseAnd", shifted, constant(255, np.uint32))
    index = op("Cast", masked, to=ir.DataType.INT32.value)  # (bits, N, words, 4)
    codes = None
    for plane in range(bits):
        bytes_ = op("Gather", index, constant(plane, np.int64), axis=0)
        table = constant(plane_table(plane, bits, zero), zero.dtype)
        part = op("Gather", table, bytes_, axis=0)  # (N, words, 4, 8)
        codes = part if codes is None else op("BitwiseOr", codes, part)
    assert codes is not None
    flat = writer.reshape(codes, 0, -1)
    if k % PACK_WORD:
        flat = op("Slice", flat, *(constant([value], np.int64) for value in (0, k, 1)))
    if signature.num_groups == 1:
        return op("Transpose", flat, perm=[1, 0], label="weight_quantized")
    turned = op("Transpose", flat, perm=[1, 0])
    groups = (signature.num_groups, signature.group_size, -1)
    return writer.reshape(turned, *groups, label="weight_quantized")


def _write_scale(
    writer: BodyWriter, weight_scale: ir.Value, signature: QLinearSignature
) -> ir.Value:
    """Append the reordering of scales (N, G) to (N,), or (G, 1, N)."""
    if signature.num_groups == 1:
        return writer.reshape(weight_scale, -1)
    turned = writer.op("Transpose", weight_scale, perm=[1, 0])
    return writer.op("Unsqueeze", turned, writer.constant([1], np.int64))


def write_packed(
    writer: BodyWriter, signature: QLinearSignature, *tensors: ir.Value, bias: ir.Value | None
) -> ir.Value:
    """Append a layer whose weight comes as bit planes, and return y.

    Args:
        writer: Records the nodes.
        signature: Formats and sizes of the layer.
        *tensors: x (..., K) float32, planes (bits, N, ceil(K / 32)) INT32 and weight scales (N, G)
            float32.
        bias: (N,) or None.
    """
    x, planes, scale = tensors
    weight = _write_weight(writer, planes, signature)
    weight_scale = _write_scale(writer, scale, signature)
    return QLinearBody(writer, signature).write(x, weight, weight_scale, bias)
