"""The Pareto drop: which configurations of a node survive.

Points are (cost, error), both to be small. They are sorted into fronts of points that no other
one of the rest dominates. If the first front holds more than are kept, it is thinned evenly in
cost with both ends kept; if it holds fewer, the next fronts fill up in order of crowding distance.

TreeQ publishes a Pareto drop on (average bits, MSE) that keeps 16; fronts and crowding distance
are those of NSGA-II (Deb et al., 2002, sections III A and B), thinning in cost is ours.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def sort_fronts(costs: NDArray[np.float64], errors: NDArray[np.float64]) -> list[list[int]]:
    """Sort points into fronts.

    Args:
        costs: (n,) float64.
        errors: (n,) float64; a NaN counts as infinite.

    Returns:
        Fronts of indices, each ascending in cost. Of equal points the first one is in the earlier
        front.

    >>> sort_fronts(np.array([1.0, 2.0, 2.0, 3.0]), np.array([3.0, 1.0, 2.0, 2.0]))
    [[0, 1], [2], [3]]
    """
    errors = np.where(np.isnan(errors), np.inf, errors)
    order = np.lexsort((np.arange(len(costs)), errors, costs))
    fronts: list[list[int]] = []
    least: list[float] = []  # error of the last point of each front
    for index in order:
        # The last point of each front costs no more: a front takes the point if it is better.
        at = next((f for f, error in enumerate(least) if errors[index] < error), len(fronts))
        if at == len(fronts):
            fronts.append([])
            least.append(np.inf)
        fronts[at].append(int(index))
        least[at] = float(errors[index])
    return fronts


def thin_evenly(values: NDArray[np.float64], keep: int) -> list[int]:
    """Return positions of `keep` ascending values that lie evenly, both ends among them.

    >>> thin_evenly(np.array([0.0, 0.1, 0.2, 5.0, 10.0]), 3)
    [0, 3, 4]
    """
    if len(values) <= keep:
        return list(range(len(values)))
    free = list(range(len(values)))
    chosen: list[int] = []
    for target in np.linspace(values[0], values[-1], keep):
        nearest = min(free, key=lambda at: (abs(values[at] - target), at))
        free.remove(nearest)
        chosen.append(nearest)
    return sorted(chosen)


def crowding_distance(
    costs: NDArray[np.float64], errors: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return each point's crowding distance in its front: infinite at the ends.

    Args:
        costs: (n,) ascending.
        errors: (n,), of the same points.

    Returns:
        (n,) the sum over both axes of the gap between neighbours, relative to the extent.
    """
    distance = np.zeros(len(costs))
    if len(costs) <= 2:
        return np.full(len(costs), np.inf)
    distance[[0, -1]] = np.inf
    for axis in (costs, np.where(np.isfinite(errors), errors, 0.0)):
        extent = float(axis.max() - axis.min())
        if extent > 0:
            distance[1:-1] += np.abs(axis[2:] - axis[:-2]) / extent
    return distance


def drop(costs: Sequence[float], errors: Sequence[float], keep: int) -> list[int]:
    """Return the indices of the points that are kept, ascending in cost.

    Args:
        costs: One per point.
        errors: One per point.
        keep: How many to keep at most, 2 or more.
    """
    cost, error = np.asarray(costs, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    kept: list[int] = []
    for front in sort_fronts(cost, error):
        missing = keep - len(kept)
        if not kept and len(front) > missing:
            kept = [front[at] for at in thin_evenly(cost[front], missing)]
        elif len(front) > missing:
            distance = crowding_distance(cost[front], error[front])
            by_distance = sorted(range(len(front)), key=lambda at: (-distance[at], at))
            kept += [front[at] for at in by_distance[:missing]]
        else:
            kept += front
        if len(kept) >= keep:
            break
    return sorted(kept, key=lambda index: (cost[index], index))
