"""Grouped orthonormal Hadamard rotation along the input channels.

x' = x H_g with H_g block diagonal, each block the Sylvester-Hadamard matrix of order g divided by
sqrt(g). It is symmetric and its own inverse, so (W H_g)(x H_g)^T = W x^T: rotating both weight and
activation leaves the product as it is, while a token's entries become close to Gaussian.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from treeq_export.ops import MAX_ROTATION


def largest_group(in_features: int) -> int:
    """Return the largest power of two up to `MAX_ROTATION` that divides a layer's input features.

    >>> [largest_group(k) for k in (1152, 96, 36, 35)]
    [128, 32, 4, 1]
    """
    return min(in_features & -in_features, MAX_ROTATION)


@cache
def hadamard(group: int) -> NDArray[np.float64]:
    """Return the orthonormal Hadamard matrix of order `group`.

    Args:
        group: A power of two; 1 gives [[1.]].

    Returns:
        (group, group) float64, read-only; symmetric, H @ H = I.

    >>> hadamard(2).round(3).tolist()
    [[0.707, 0.707], [0.707, -0.707]]
    """
    matrix = np.ones((1, 1))
    while len(matrix) < group:
        matrix = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), matrix)
    matrix = matrix / np.sqrt(group)
    matrix.flags.writeable = False
    return matrix


def rotate(x: NDArray[np.floating], group: int) -> NDArray[np.floating]:
    """Rotate the last axis in groups: x' = x H_g.

    Args:
        x: (..., K) floating point; `group` divides K.
        group: Power of two; 1 returns x unchanged.

    Returns:
        (..., K), same dtype.
    """
    if group == 1:
        return x
    grouped = x.reshape(*x.shape[:-1], x.shape[-1] // group, group)  # no tokens are fine too
    return (grouped @ hadamard(group).astype(x.dtype)).reshape(x.shape)
