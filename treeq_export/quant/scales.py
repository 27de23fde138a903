"""Finding scales that minimise the squared quantization error over clipping ratios."""

import numpy as np
from numpy.typing import NDArray

from treeq_export.quant.grids import INTEGER, Grid
from treeq_export.quant.numerics import SCALE_FLOOR

FloatArray = NDArray[np.floating]

# The least ratio of the clipped to the full range. The best step of a Gaussian at 2 bits clips
# 1152 values to 0.31 of their largest.
LEAST_CLIP = 0.25
_CHUNK = 1 << 22  # elements per pass, 16 MB of float32


def clip_ratios(num_steps: int) -> FloatArray:
    """Return the ratios from LEAST_CLIP to 1, (num_steps,) float32, ascending; one step is 1."""
    return np.linspace(LEAST_CLIP if num_steps > 1 else 1.0, 1.0, num_steps, dtype=np.float32)


def fit_weight_scale(
    weight: FloatArray,
    bits: int,
    group_size: int | None,
    num_steps: int,
    grid: Grid = INTEGER,
) -> FloatArray:
    """Return the scales with the least squared error of each row (and group).

    Args:
        weight: (N, K), rotated, the branch already subtracted.
        bits: 2..8.
        group_size: Input channels per scale; None is one scale per row.
        num_steps: Clipping ratios to try.
        grid: The grid whose levels the weights become.

    Returns:
        (N, G) float32, at least SCALE_FLOOR.
    """
    n, k = weight.shape
    groups = np.ascontiguousarray(weight, dtype=np.float32).reshape(-1, group_size or k)
    rows = max(1, _CHUNK // groups.shape[1])
    scales = [
        _fit_rows(groups[start : start + rows], bits, num_steps, grid)
        for start in range(0, len(groups), rows)
    ]
    return np.concatenate(scales).reshape(n, -1)


def fit_tensor_scale(values: FloatArray, bits: int, num_steps: int, grid: Grid = INTEGER) -> float:
    """Return the one scale with the least squared error over all values."""
    return float(_fit_rows(values.reshape(1, -1).astype(np.float32), bits, num_steps, grid)[0])


def _fit_rows(rows: FloatArray, bits: int, num_steps: int, grid: Grid) -> FloatArray:
    full = np.abs(rows).max(axis=1) / grid.ends(bits)[1]
    best_scale = np.maximum(full, SCALE_FLOOR).astype(np.float32)
    best_error = np.full(len(rows), np.inf)
    for ratio in clip_ratios(num_steps):
        scale = np.maximum(full * ratio, SCALE_FLOOR).astype(np.float32)
        codes = grid.round(rows / scale[:, None], bits)
        error = np.square(rows - codes * scale[:, None]).sum(axis=1, dtype=np.float64)
        better = error < best_error
        best_scale[better] = scale[better]
        best_error[better] = error[better]
    return best_scale
