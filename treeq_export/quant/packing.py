"""Packed weights: bit planes.

    planes: int32 [bits, N, K/32]
    plane p, bit k % 32 of word k / 32 = bit p of (code + 2^(bits-1))
    K is padded with zeros to a multiple of 32

Exactly `bits` bits per weight; dropping the lowest plane of a symmetric grid halves its codes.
The words are int32 because TensorRT widens uint8 inputs to four times the size.
"""

import numpy as np
from numpy.typing import NDArray

from treeq_export.errors import FormatError
from treeq_export.ops import PACK_WORD


def pack(codes: NDArray[np.int8], bits: int) -> NDArray[np.int32]:
    """Pack codes into bit planes.

    Args:
        codes: (N, K) int8, each in [-2^(bits-1), 2^(bits-1) - 1].
        bits: 1..8.

    Returns:
        (bits, N, ceil(K/32)) int32.

    Raises:
        FormatError: A code is outside the range of `bits`.

    >>> pack(np.array([[-2, -1, 0, 1]], dtype=np.int8), 2)[:, 0, 0].tolist()
    [10, 12]
    """
    _check_bits(bits)
    offset = 1 << (bits - 1)
    if codes.size and (codes.min() < -offset or codes.max() > offset - 1):
        raise FormatError(
            f"codes in [{codes.min()}, {codes.max()}] do not fit {bits} bits "
            f"([{-offset}, {offset - 1}]). Quantize to {bits} bits first."
        )
    n, k = codes.shape
    unsigned = np.zeros((n, -(-k // PACK_WORD) * PACK_WORD), dtype=np.uint8)
    unsigned[:, :k] = (codes.astype(np.int16) + offset).astype(np.uint8)
    planes = [
        np.packbits((unsigned >> p) & 1, axis=1, bitorder="little").view("<i4") for p in range(bits)
    ]
    return np.stack(planes).astype(np.int32, copy=False)


def unpack(planes: NDArray[np.int32], in_features: int) -> NDArray[np.int8]:
    """Unpack bit planes into codes; the inverse of `pack`.

    Args:
        planes: (bits, N, ceil(K/32)) int32.
        in_features: K, which the padding hides.

    Returns:
        (N, K) int8.

    Raises:
        FormatError: The number of words does not match `in_features`.
    """
    bits, n, words = planes.shape
    _check_bits(bits)
    if words != -(-in_features // PACK_WORD):
        raise FormatError(
            f"planes hold {words} words per row, expected {-(-in_features // PACK_WORD)} "
            f"for in_features {in_features}. Pack the codes of this layer."
        )
    raw = np.ascontiguousarray(planes.astype("<i4")).view(np.uint8).reshape(bits, n, words * 4)
    unsigned = np.zeros((n, in_features), dtype=np.int16)
    for p in range(bits):
        plane = np.unpackbits(raw[p], axis=1, bitorder="little")[:, :in_features]
        unsigned |= plane.astype(np.int16) << p
    return (unsigned - (1 << (bits - 1))).astype(np.int8)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise FormatError(f"bits {bits} cannot be packed. Use 1..8.")
