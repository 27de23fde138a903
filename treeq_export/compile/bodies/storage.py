"""How codes are stored, so that no runtime multiplies them with saturation.

x86 processors without VNNI add pairs of products of UINT8 activations and INT8 weights in 16 bits,
with saturation, and runtimes there turn INT8 activations of Q/DQ into UINT8 by adding 128. Arm
processors without dot products add pairs of INT8 times INT8 in 16 bits, where only two times
-128 * -128 overflows, and ONNX Runtime there turns UINT8 activations into INT8 by subtracting 128.
Codes and weights are therefore stored with zero points that keep each pair within 16 bits, see
`zero_points`; UINT8 times UINT8 is never added in 16 bits.
"""

from typing import NamedTuple

import numpy as np

from treeq_export.compile.graph.signature import QLinearSignature


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
    # Sums of positive products end at 32767, those of negative ones at -32768.
    least, largest = signature.weight_grid.ends(signature.weight_bits)
    size, is_float = max(-least, largest + 1), not signature.act_bits
    if is_float or (signature.num_groups == 1 and 2 * 255 * size <= _LEAST_PAIR):
        return SIGNED
    qmin, qmax = signature.act_grid.ends(signature.act_bits)
    codes = np.uint8(-qmin + (qmin > -128))
    fits = 2 * (qmax + int(codes)) * size <= _LEAST_PAIR
    return ZeroPoints(codes, np.int8(0) if fits else np.uint8(128))
