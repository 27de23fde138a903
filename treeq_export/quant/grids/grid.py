"""What a number grid is.

    level = levels[code]            code 0 .. L-1, as the bit planes hold it; the level is an int8
    x_hat = level * scale           products of levels are summed in int32

A value in units of its scale becomes the nearest level by one of two rules, which every host
computes alike. Both are exact in floating point but for the one product, so that no host differs:

    consecutive levels   rint(clip(v, least, largest))
    cells                cells.levels[clip(floor(v * per_unit), first, last) - first]
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Levels = NDArray[np.int8]


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells of equal width, each with the level of the values in it.

    Attributes:
        per_unit: Cells per unit of the levels, best a power of two.
        first: Number of the first cell; cell 0 begins at 0.
        levels: Level of each cell, (cells,) int8; the outer ones take what lies beyond.
    """

    per_unit: float
    first: int
    levels: Levels

    @property
    def last(self) -> int:
        """Number of the last cell."""
        return self.first + len(self.levels) - 1


@dataclass(frozen=True, eq=False)
class Grid:
    """A number grid at all its widths.

    Attributes:
        name: Word in recipes, plans and graphs.
        levels: Bits to the levels in the order of their codes, (L,) int8, ascending, L <= 2^bits.
        gaussian_step: Step that minimises the squared error of a unit Gaussian, by bits; its keys
            are the widths of the grid.
        cells: Bits to the cells of the values; None for levels that are consecutive integers.
        num_coefficients: Bits to the int8 coefficients beside each scale that the levels are made
            of; 0 for constant levels.
    """

    name: str
    levels: Callable[[int], Levels]
    gaussian_step: Mapping[int, float]
    cells: Callable[[int], Cells] | None = None
    num_coefficients: Callable[[int], int] = lambda _bits: 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", cache(self.levels))

    @property
    def widths(self) -> tuple[int, ...]:
        """The grid's numbers of bits, ascending."""
        return tuple(sorted(self.gaussian_step))

    def ends(self, bits: int) -> tuple[int, int]:
        """Return the least and the largest level."""
        levels = self.levels(bits)
        return int(levels[0]), int(levels[-1])

    def magnitude(self, bits: int) -> int:
        """Return the largest absolute value of a level."""
        least, largest = self.ends(bits)
        return max(-least, largest)

    def round(self, values: NDArray[np.floating], bits: int) -> NDArray[np.floating]:
        """Return the nearest levels, as floating point.

        Args:
            values: Any shape, in units of the scale.
            bits: One of the grid's widths.

        Returns:
            Levels of the same shape and dtype. NaN stays NaN with consecutive levels and takes the
            level of cell 0 with cells.
        """
        if self.cells is None:
            return np.rint(np.clip(values, *self.ends(bits)))
        cells = self.cells(bits)
        cell = np.clip(np.floor(values * cells.per_unit), cells.first, cells.last)
        index = np.nan_to_num(cell, nan=0.0).astype(np.intp) - cells.first
        return cells.levels[index].astype(values.dtype)

    def size_bytes(self, bits: int, num_words: int, num_scales: int) -> int:
        """Return the size of a packed weight with its float32 scales.

        Args:
            bits: Bits per weight.
            num_words: Words of one bit plane.
            num_scales: Scales, one per output channel and group.
        """
        return 4 * (bits * num_words + num_scales) + self.num_coefficients(bits) * num_scales
