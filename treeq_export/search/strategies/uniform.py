"""Strategy `uniform`: one width for all layers. The baseline of every other strategy.

A fractional average takes two neighbouring widths, spread evenly over the network.
"""

import math
from collections.abc import Sequence

import numpy as np

from treeq_export.errors import RecipeError
from treeq_export.ops import MAX_BITS
from treeq_export.quant.grids import INTEGER, find_grid
from treeq_export.recipe import SearchSection
from treeq_export.search.budget import CostModel
from treeq_export.search.strategies.context import Outcome, SearchContext
from treeq_export.search.tree import Configuration, Leaf


def search_uniform(context: SearchContext) -> Outcome:
    """Return the recipe's bits for every leaf, or the uniform assignment at the recipe's budget.

    Raises:
        RecipeError: The budget cannot be met.
    """
    section = context.section
    if section.budget is not None:
        return Outcome(uniform_configuration(context.costs, section), math.nan)
    bits = section.weight_bits, section.activation_bits
    return Outcome((bits,) * len(context.leaves), math.nan)


def uniform_configuration(
    costs: CostModel,
    section: SearchSection,
    widths: tuple[Sequence[int], Sequence[int]] | None = None,
) -> Configuration:
    """Return the uniform assignment at the recipe's budget.

    Args:
        costs: Costs of configurations of the network.
        section: The budget. Where it does not limit weights or activations, they get the recipe's
            weight_bits or activation_bits.
        widths: Widths of weights and of activations, to choose from; None is all of their grids.

    Raises:
        RecipeError: Even the least width exceeds the size.
    """
    limits = section.budget
    assert limits is not None
    if widths is None:
        widths = find_grid(section.weight_grid).widths, find_grid(section.activation_grid).widths
    leaves = costs.network.leaves
    bits = limits.activation_bits or section.activation_bits or MAX_BITS
    activation = spread_bits(leaves, max(bits, min(widths[1])), widths[1])

    def at(average: float) -> Configuration:
        return tuple(zip(spread_bits(leaves, average, widths[0]), activation, strict=True))

    unlimited = MAX_BITS if limits.size_bytes is not None else section.weight_bits
    least_bits = min(widths[0])
    average = max(limits.weight_bits or unlimited, least_bits)
    if limits.size_bytes is None:
        return at(average)
    steps = np.arange(least_bits, average + 1e-9, 1 / 64)
    fitting = [x for x in steps if costs.cost(at(float(x))).size_bytes <= limits.size_bytes]
    if not fitting:
        least = costs.cost(at(least_bits)).size_bytes
        raise RecipeError(
            f"search.budget.size_bytes: received {limits.size_bytes}, expected at least {least}, "
            f"which {least_bits} bits and the branches need. Raise it, or lower the branch."
        )
    return at(float(fitting[-1]))


def spread_bits(
    leaves: Sequence[Leaf], average: float, widths: Sequence[int] = INTEGER.widths
) -> list[int]:
    """Return one width per leaf: two neighbouring ones, spread evenly, at most `average`.

    Args:
        leaves: All leaves.
        average: Average bits, weighted by number of weights; at least the least width.
        widths: The widths to choose from.
    """
    low = max(width for width in widths if width <= average + 1e-9)
    high = min((width for width in widths if width > low), default=low)
    total = sum(leaf.num_weights for leaf in leaves)
    fraction = min((average - low) / (high - low), 1.0) if high > low else 0.0
    left = fraction * total  # weights that may have the higher width
    owed = 0.0
    bits: list[int] = []
    for leaf in leaves:
        owed += fraction * leaf.num_weights
        raised = owed >= leaf.num_weights / 2 and left >= leaf.num_weights * (1 - 1e-9)
        if raised:
            owed -= leaf.num_weights
            left -= leaf.num_weights
        bits.append(high if raised else low)
    return bits
