"""Grid `integer`: two's complement, -2^(bits-1) .. 2^(bits-1) - 1."""

import numpy as np
from numpy.typing import NDArray

from treeq_export.quant.grids.grid import Grid

# The step that minimises the squared error of a unit Gaussian on the grid step * {qmin..qmax} of a
# two's complement integer, by bits. tests/quant/test_gaussian_step.py derives each number.
_GAUSSIAN_STEP = {
    2: 1.048385,
    3: 0.601824,
    4: 0.338608,
    5: 0.188792,
    6: 0.104179,
    7: 0.056887,
    8: 0.030766,
}


def _levels(bits: int) -> NDArray[np.int8]:
    half = 1 << (bits - 1)
    return np.arange(-half, half).astype(np.int8)


INTEGER = Grid("integer", _levels, _GAUSSIAN_STEP)
