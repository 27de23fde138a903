"""One option per leaf with the least sum of errors within the budget: exactly, or as prices."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from treeq_export.search.budget import Budget, Cost

FloatArray = NDArray[np.float64]
Option = tuple[int, int]  # leaf, option


def solve_assignment(
    errors: Sequence[Sequence[float]],
    costs: Sequence[Sequence[Cost]],
    budget: Budget,
    changes: tuple[Sequence[int], int] | None = None,
) -> list[int]:
    """Choose one option per leaf with the least sum of errors within the budget.

    Args:
        errors: Error of every option of every leaf.
        costs: Cost of the same.
        budget: The limits.
        changes: The present option of every leaf, and how many leaves may take another one.

    Returns:
        The number of the chosen option of every leaf.
    """
    flat = _flatten(errors)
    objective = np.array([errors[leaf][option] for leaf, option in flat])
    objective = objective / max(float(np.abs(objective).max()), 1e-300)
    constraints = [LinearConstraint(_one_each(flat), 1, 1)]
    parts = np.array([budget.fractions(costs[leaf][option]) for leaf, option in flat])
    constraints.append(LinearConstraint(parts.T, -np.inf, 1 + 1e-12))
    if changes is not None:
        present, most_changes = changes
        row = np.array([float(option != present[leaf]) for leaf, option in flat])
        constraints.append(LinearConstraint(row[None], 0, most_changes))
    result = milp(
        objective,
        constraints=constraints,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    chosen = [0] * len(errors)
    for (leaf, option), value in zip(flat, result.x, strict=True):
        if value > 0.5:
            chosen[leaf] = option
    return chosen


@dataclass(frozen=True)
class Allocation:
    """How the budget would be spent if leaves could mix their options.

    Attributes:
        shares: (leaves, limits) what part of every limit each leaf takes.
        prices: (limits,) by how much the sum of errors falls per whole limit; 0 for a limit that
            is not reached.
    """

    shares: FloatArray
    prices: FloatArray


def allocate(
    errors: Sequence[Sequence[float]], costs: Sequence[Sequence[Cost]], budget: Budget
) -> Allocation:
    """Solve the linear program behind `solve_assignment`; the prices are its dual values.

    Args:
        errors: Error of every option of every leaf.
        costs: Cost of the same.
        budget: The limits, in the order of `Budget.fractions`.
    """
    flat = _flatten(errors)
    values = np.array([errors[leaf][option] for leaf, option in flat])
    scale = max(float(np.abs(values).max()), 1e-300)
    parts = np.array([budget.fractions(costs[leaf][option]) for leaf, option in flat])
    one_each = _one_each(flat)
    result = linprog(
        values / scale,
        A_ub=parts.T,
        b_ub=np.full(parts.shape[1], 1 + 1e-9),
        A_eq=one_each,
        b_eq=np.ones(len(errors)),
        bounds=(0, 1),
        method="highs",
    )
    prices = np.maximum(-np.asarray(result.ineqlin.marginals), 0.0) * scale
    return Allocation(one_each @ (result.x[:, None] * parts), prices)


def _flatten(errors: Sequence[Sequence[float]]) -> list[Option]:
    return [(leaf, option) for leaf, row in enumerate(errors) for option in range(len(row))]


def _one_each(flat: Sequence[Option]) -> FloatArray:
    """Return the matrix that sums up the options of every leaf."""
    leaves = np.array([leaf for leaf, _ in flat])
    return (leaves[None] == np.arange(leaves.max() + 1)[:, None]).astype(np.float64)
