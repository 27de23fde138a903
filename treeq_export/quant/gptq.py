"""Rounding weights one input channel after the other, each passing its error on to the next.

Rounding to nearest minimises |W - W_q|. What counts is the output error

    |X (W - W_q)^T|^2 = tr((W - W_q) H (W - W_q)^T),    H = X^T X,

and the inputs are correlated: when channel j is rounded, the channels after it can take over part
of its error. With U the upper Cholesky factor of H^-1 the update is

    e_j = (w_j - q_j s) / U_jj;    w_k <- w_k - e_j U_jk   for all k > j

The scales stay as they were fitted; only the codes change.

Where the inputs that the codes meet, A, differ from the clean X (earlier layers and the activation
quantizer have changed them), W is first replaced by the weight that gives the clean output from A:

    W* = argmin |Y - A W*^T|^2 + n lambda |W* - W|^2 = W + (Y - A W^T)^T A (A^T A + n lambda I)^-1

Sources: Frantar et al., GPTQ, 2022 (section 3, algorithm 1); the asymmetric objective is that of
Li et al., GPTAQ, 2025, solved here in closed form ahead of the loop. X are here the rotated inputs,
and W the residual beside a branch.
"""

import numpy as np
from numpy.typing import NDArray

from treeq_export.quant.grids import INTEGER, Grid

DAMPING = 0.01  # of the mean diagonal of H, as published
_BLOCK = 128  # channels whose updates of the later channels are applied at once

FloatArray = NDArray[np.floating]


def second_moment(tokens: FloatArray) -> NDArray[np.float64]:
    """Return the damped H = X^T X / n of rotated tokens (n, K), as (K, K)."""
    x = tokens.astype(np.float64)
    moment = x.T @ x / max(len(x), 1)
    mean = float(np.trace(moment)) / len(moment)
    return moment + (DAMPING * mean if mean > 0 else 1.0) * np.eye(len(moment))


def refit_weight(
    weight: FloatArray, tokens: FloatArray, target: FloatArray, moment: NDArray[np.float64]
) -> FloatArray:
    """Return W*, the weight near W that gives the target from the tokens that the codes will meet.

    Args:
        weight: W, (N, K).
        tokens: A, (n, K).
        target: Y, (n, N).
        moment: The damped A^T A / n (`second_moment`); its damping is lambda.

    Returns:
        (N, K) float32.
    """
    missed = target - tokens @ weight.T
    correlation = (tokens.T @ missed).astype(np.float64) / max(len(tokens), 1)
    return (weight + np.linalg.solve(moment, correlation).T).astype(np.float32)


def inverse_factor(moment: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return U, the upper Cholesky factor of H^-1, for a damped H (`second_moment`)."""
    return np.asarray(np.linalg.cholesky(np.linalg.inv(moment)).T, dtype=np.float64)


def quantize_weight_gptq(
    weight: FloatArray,
    scale: FloatArray,
    bits: int,
    upper: NDArray[np.float64],
    grid: Grid = INTEGER,
) -> NDArray[np.int8]:
    """Return codes that minimise the output error rather than the weight error.

    Args:
        weight: (N, K), rotated, the branch already subtracted.
        scale: (N, G) positive.
        bits: 2..8.
        upper: U, (K, K) (`inverse_factor`).
        grid: The grid whose levels the weights become.

    Returns:
        (N, K) int8.
    """
    n, k = weight.shape
    group = k // scale.shape[1]
    rest = weight.astype(np.float64)
    codes = np.empty((n, k), dtype=np.int8)
    for start in range(0, k, _BLOCK):
        end = min(start + _BLOCK, k)
        errors = np.empty((n, end - start))
        for j in range(start, end):
            step = scale[:, j // group].astype(np.float64)
            column = grid.round(rest[:, j] / step, bits)
            codes[:, j] = column.astype(np.int8)
            error = (rest[:, j] - column * step) / upper[j, j]
            errors[:, j - start] = error
            rest[:, j + 1 : end] -= np.outer(error, upper[j, j + 1 : end])
        rest[:, end:] -= errors @ upper[start:end, end:]
    return codes
