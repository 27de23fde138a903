"""The arithmetic of a quantized linear, in numpy. Every backend is compared with this file.

    x'   = x H_g
    s_x  = step * rms(x')  |  step * max|x'|  |  step       token_rms | token_absmax | tensor_static
    q_x  = round(x' * (1 / s_x))                             reciprocal; the grid's levels
    acc  = q_x q_w^T                                         int32, exact
    y    = (acc * s_w) * s_x + M x + b

`round` is the grid's (quant/grids): clip and round half to even for `integer`. `step` is one number
per layer: the grid's Gaussian step for token_rms, 1 / its largest level for token_absmax and the
calibrated scale for tensor_static. s_x is kept at least SCALE_FLOOR, so a token of zeros has
codes of zeros instead of 0 * inf. The int8 arrays named `codes` hold levels.
"""

import numpy as np
from numpy.typing import NDArray

from treeq_export.ops import ActScale
from treeq_export.quant.grids import INTEGER, Grid
from treeq_export.quant.rotation import rotate
from treeq_export.quant.spec import ActivationFormat

SCALE_FLOOR = 1e-20

FloatArray = NDArray[np.floating]


def activation_step(activation: ActivationFormat) -> float | None:
    """Return the step of a format, None where calibration has to find it or there is none."""
    if activation.bits is None or activation.scale.is_static:
        return None
    if activation.scale == ActScale.TOKEN_RMS:
        return activation.numbers.gaussian_step[activation.bits]
    return 1.0 / activation.numbers.ends(activation.bits)[1]


def activation_scale(x: FloatArray, scale: ActScale, step: float) -> FloatArray:
    """Return s_x of (rotated) activations.

    Args:
        x: (..., K) floating point.
        scale: Source of the scale, not "none".
        step: The layer's step.

    Returns:
        (..., 1), same dtype as x, at least SCALE_FLOOR.
    """
    step_ = x.dtype.type(step)
    if scale == ActScale.TOKEN_RMS:
        raw = np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) * step_
    elif scale == ActScale.TOKEN_ABSMAX:
        raw = np.max(np.abs(x), axis=-1, keepdims=True) * step_
    else:
        raw = np.full((*x.shape[:-1], 1), step_, dtype=x.dtype)
    return np.maximum(raw, x.dtype.type(SCALE_FLOOR))


def quantize_activation(
    x: FloatArray, scale: FloatArray, bits: int, grid: Grid = INTEGER
) -> NDArray[np.int8]:
    """Return q_x = round(x * (1 / scale)).

    Args:
        x: (..., K), rotated.
        scale: (..., 1), positive.
        bits: 2..8.
        grid: The grid whose levels are wanted.

    Returns:
        (..., K) int8; where x or the scale is NaN, the level of 0, because int8 has no NaN. A
        scale per token is then NaN itself and carries it into that token's output; a static scale
        does not.
    """
    with np.errstate(invalid="ignore"):  # inf * (1 / inf)
        scaled = x * (x.dtype.type(1) / scale)
    return np.nan_to_num(grid.round(scaled, bits), nan=0.0).astype(np.int8)


def quantize_weight(
    weight: FloatArray, scale: FloatArray, bits: int, grid: Grid = INTEGER
) -> NDArray[np.int8]:
    """Return q_w = round(W / s_w).

    Args:
        weight: (N, K), rotated, the branch already subtracted.
        scale: (N, G) positive, G divides K; G = 1 is one scale per output channel.
        bits: 2..8.
        grid: The grid whose levels are wanted.

    Returns:
        (N, K) int8.
    """
    n, k = weight.shape
    grouped = weight.reshape(n, scale.shape[1], -1) / scale[:, :, None]
    return grid.round(grouped, bits).astype(np.int8).reshape(n, k)


def dequantize_weight(codes: NDArray[np.int8], scale: FloatArray) -> FloatArray:
    """Return codes * s_w, (N, K), dtype of the scale (N, G)."""
    n, k = codes.shape
    grouped = codes.reshape(n, scale.shape[1], -1).astype(scale.dtype)
    return (grouped * scale[:, :, None]).reshape(n, k)


def accumulate(
    q_x: NDArray[np.int8], q_w: NDArray[np.int8], num_groups: int = 1
) -> NDArray[np.int32]:
    """Return the exact integer products, one per group of input channels.

    Args:
        q_x: (..., K) int8.
        q_w: (N, K) int8.
        num_groups: G, divides K.

    Returns:
        (..., G, N) int32; the sum over G is q_x q_w^T.
    """
    n, k = q_w.shape
    x = q_x.reshape(*q_x.shape[:-1], num_groups, k // num_groups).astype(np.float64)
    w = q_w.reshape(n, num_groups, k // num_groups).astype(np.float64)
    # float64 products of 8-bit codes are exact up to K = 2^38, and BLAS is far faster than int32.
    return np.einsum("...gk,ngk->...gn", x, w, optimize=True).astype(np.int32)


def dequantize_output(
    accumulators: NDArray[np.int32], weight_scale: FloatArray, scale: FloatArray
) -> FloatArray:
    """Return (acc * s_w) * s_x summed over groups.

    Args:
        accumulators: (..., G, N) int32.
        weight_scale: (N, G).
        scale: (..., 1), the activation's.

    Returns:
        (..., N), dtype of the scales.
    """
    scaled = accumulators.astype(weight_scale.dtype) * weight_scale.T
    return scaled.sum(axis=-2, dtype=weight_scale.dtype) * scale


def qlinear(
    x: FloatArray,
    codes: NDArray[np.int8],
    weight_scale: FloatArray,
    *,
    activation: ActivationFormat,
    step: float | None,
    rotation_group: int,
    bias: FloatArray | None = None,
) -> FloatArray:
    """Return the reference output of `treeq::QLinear` (without the branch).

    Args:
        x: (..., K) floating point.
        codes: (N, K) int8.
        weight_scale: (N, G).
        activation: Format of x.
        step: The layer's activation step; None exactly where x is not quantized.
        rotation_group: Power of two dividing K; 1 is no rotation.
        bias: (N,) or None.

    Returns:
        (..., N), dtype of x. A token that holds NaN gives NaN in its own row, except under a static
        scale, where NaN has the code 0.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # a token that holds inf becomes NaN
        rotated = rotate(x, rotation_group)
        if activation.bits is None or step is None:
            y = rotated @ dequantize_weight(codes, weight_scale.astype(x.dtype)).T
        else:
            scale = activation_scale(rotated, activation.scale, step)
            q_x = quantize_activation(rotated, scale, activation.bits, activation.numbers)
            accumulators = accumulate(q_x, codes, weight_scale.shape[1])
            y = dequantize_output(accumulators, weight_scale.astype(x.dtype), scale)
    return y if bias is None else y + bias.astype(x.dtype)
