"""The Frechet distance between Gaussian fits of two sets of features.

    d = |m1 - m2|^2 + Tr(S1) + Tr(S2) - 2 Tr((S1 S2)^(1/2))

The last trace is the sum of the square roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is
symmetric and has those of S1 S2. So singular covariances (fewer images than features, features that
are always zero) need no regularisation.

Source: Heusel et al., GANs Trained by a Two Time-Scale Update Rule, 2017 (eq. 6).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian fit.

    Attributes:
        mean: (d,) float64.
        covariance: (d, d) float64, symmetric.
    """

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]


def fit_gaussian(features: ArrayLike) -> Gaussian:
    """Return mean and unbiased covariance.

    Args:
        features: (n, d), n at least 2, any real dtype.
    """
    rows = np.asarray(features, dtype=np.float64)
    return Gaussian(rows.mean(axis=0), np.atleast_2d(np.cov(rows, rowvar=False)))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Return the squared Frechet distance; at least 0, symmetric up to rounding.

    >>> unit = Gaussian(np.zeros(2), np.eye(2))
    >>> frechet_distance(unit, Gaussian(np.array([3.0, 4.0]), 4 * np.eye(2)))
    27.0
    """
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ second.covariance @ root)
    cross = np.sqrt(np.maximum(eigenvalues, 0.0)).sum()
    shift = first.mean - second.mean
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return max(float(shift @ shift + traces - 2.0 * cross), 0.0)
