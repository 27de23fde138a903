"""Packed weights: bit planes.

    planes: int32 [bits, N, K/32]
    plane p, bit k % 32 of word k / 32 = bit p of the weight's place among its grid's levels
    K is padded with zeros to a multiple of 32

In the grid `integer` the place is level + 2^(bits-1), and dropping the lowest plane halves the
levels. Exactly `bits` bits per weight. The words are int32 because TensorRT widens uint8 inputs to
four times the size.
"""

import numpy as np
from numpy.typing import NDArray

from treeq_export.errors import FormatError
from treeq_export.ops import PACK_WORD
from treeq_export.quant.grids import INTEGER, Grid


def pack(codes: NDArray[np.int8], bits: int, grid: Grid = INTEGER) -> NDArray[np.int32]:
    """Pack levels into bit planes.

    Args:
        codes: (N, K) int8, levels of the grid.
        bits: 1..8.
        grid: The grid of the levels.

    Returns:
        (bits, N, ceil(K/32)) int32.

    Raises:
        FormatError: One is no level of the grid.

    >>> pack(np.array([[-2, -1, 0, 1]], dtype=np.int8), 2)[:, 0, 0].tolist()
    [10, 12]
    """
    _check_bits(bits)
    levels = grid.levels(bits)
    places = np.full(256, -1, dtype=np.int16)  # by level, as the byte that it is
    places[levels.view(np.uint8)] = np.arange(len(levels))
    found = places[np.ascontiguousarray(codes).view(np.uint8)]
    if found.min(initial=0) < 0:
        of = "" if grid is INTEGER else f" of grid {grid.name}"
        raise FormatError(
            f"codes in [{codes.min()}, {codes.max()}] do not fit {bits} bits{of} "
            f"([{levels[0]}, {levels[-1]}]). Quantize to {bits} bits first."
        )
    n, k = codes.shape
    unsigned = np.zeros((n, -(-k // PACK_WORD) * PACK_WORD), dtype=np.uint8)
    unsigned[:, :k] = found
    planes = [
        np.packbits((unsigned >> p) & 1, axis=1, bitorder="little").view("<i4") for p in range(bits)
    ]
    return np.stack(planes).astype(np.int32, copy=False)


def unpack(planes: NDArray[np.int32], in_features: int, grid: Grid = INTEGER) -> NDArray[np.int8]:
    """Unpack bit planes into levels; the inverse of `pack`.

    Args:
        planes: (bits, N, ceil(K/32)) int32.
        in_features: K, which the padding hides.
        grid: The grid of the levels.

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
    unsigned = np.zeros((n, in_features), dtype=np.uint8)
    for p in range(bits):
        unsigned |= np.unpackbits(raw[p], axis=1, bitorder="little")[:, :in_features] << p
    return grid.levels(bits)[unsigned]


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise FormatError(f"bits {bits} cannot be packed. Use 1..8.")
