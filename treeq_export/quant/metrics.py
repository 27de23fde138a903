"""Error measures. Each compares `x_hat` with a reference `x`."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def sqnr_db(x: ArrayLike, x_hat: ArrayLike) -> float:
    """Return the signal to quantization noise ratio 20 log10(|x| / |x - x_hat|), in dB.

    Args:
        x: The reference, any shape.
        x_hat: The approximation, same shape.

    Returns:
        inf where both are equal, -inf where only the reference is zero, nan where one is not
        finite. The sums are float64.

    >>> round(sqnr_db([1.0, 1.0], [1.1, 0.9]), 2)
    20.0
    """
    reference = np.asarray(x, dtype=np.float64)
    error = _difference(reference, x_hat)
    signal, noise = float(np.linalg.norm(reference)), float(np.linalg.norm(error))
    if not math.isfinite(signal) or not math.isfinite(noise):
        return math.nan
    if noise == 0.0:
        return math.inf
    return 20 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def max_abs_error(x: ArrayLike, x_hat: ArrayLike) -> float:
    """Return max |x - x_hat|; 0 for empty arrays, nan where one holds nan or both inf."""
    error = np.abs(_difference(x, x_hat))
    return float(error.max()) if error.size else 0.0


def equal_code_fraction(codes: ArrayLike, codes_hat: ArrayLike) -> float:
    """Return the fraction of equal integers; 1 for empty arrays.

    >>> equal_code_fraction([1, 2, 3, 4], [1, 2, 3, 5])
    0.75
    """
    equal = np.asarray(codes) == np.asarray(codes_hat)
    return float(equal.mean()) if equal.size else 1.0


def psnr_db(x: ArrayLike, x_hat: ArrayLike, data_range: float) -> float:
    """Return the peak signal to noise ratio 20 log10(range / rmse), in dB.

    Args:
        x: The reference, any shape.
        x_hat: The approximation, same shape.
        data_range: Largest minus smallest possible value.

    Returns:
        inf where both are equal (or empty), nan where one is not finite.

    >>> round(psnr_db([0.0, 0.0], [0.1, -0.1], data_range=1.0), 2)
    20.0
    """
    error = _difference(x, x_hat)
    rmse = float(np.linalg.norm(error)) / math.sqrt(max(error.size, 1))
    if not math.isfinite(rmse):
        return math.nan
    return math.inf if rmse == 0.0 else 20 * math.log10(data_range / rmse)


def _difference(x: ArrayLike, x_hat: ArrayLike) -> NDArray[np.float64]:
    """Return x - x_hat in float64; inf - inf is nan without a warning."""
    with np.errstate(invalid="ignore"):
        return np.asarray(x, dtype=np.float64) - np.asarray(x_hat, dtype=np.float64)
