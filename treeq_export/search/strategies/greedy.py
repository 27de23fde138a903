"""Baselines of the tree search: uniform bits, integer programming, greedy lowering of bits.

    uniform              one width for all; a fractional average takes two neighbouring widths,
                         spread evenly over the network
    integer_programming  least sum of single-leaf errors within the budget: each leaf alone is
                         quantized to each candidate, the error is that of the network's prediction
    greedy               from the largest candidates down: the step that costs the least error per
                         bit saved, each measured on the network as it then is

The step's error in `greedy` is measured lazily: an old value is taken as a lower bound, and only
the most promising step is measured anew (as in lazy greedy submodular maximisation, Minoux 1978).
"""

import heapq
from collections.abc import Sequence

import numpy as np

from treeq_export.errors import RecipeError
from treeq_export.ops import MAX_BITS, MIN_BITS
from treeq_export.recipe import SearchSection
from treeq_export.search.budget import Budget, CostModel
from treeq_export.search.formats import Pair
from treeq_export.search.strategies.assignment import solve_assignment
from treeq_export.search.strategies.context import Outcome, SearchContext
from treeq_export.search.tree import Configuration, Leaf

ALL_WIDTHS = tuple(range(MIN_BITS, MAX_BITS + 1))


def spread_bits(
    leaves: Sequence[Leaf], average: float, widths: Sequence[int] = ALL_WIDTHS
) -> list[int]:
    """Return one width per leaf: two neighbouring ones, spread evenly, at most `average`.

    Args:
        leaves: All leaves.
        average: Average bits, weighted by number of weights; at least the least width.
        widths: What to choose from.
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


def uniform_configuration(
    leaves: Sequence[Leaf],
    costs: CostModel,
    section: SearchSection,
    widths: tuple[Sequence[int], Sequence[int]] = (ALL_WIDTHS, ALL_WIDTHS),
) -> Configuration:
    """Return the uniform assignment at the recipe's budget.

    Args:
        leaves: All leaves.
        costs: Of the network.
        section: Its budget. Where that does not limit weights or activations, they get the
            recipe's weight_bits or activation_bits.
        widths: Of weights and of activations, to choose from.

    Raises:
        RecipeError: Even the least width exceeds the size.
    """
    limits = section.budget
    assert limits is not None

    def within(average: float, axis: int) -> float:
        return max(average, min(widths[axis]))

    default = section.activation_bits or MAX_BITS
    bits = within(limits.activation_bits or default, 1)
    activation = spread_bits(leaves, bits, widths[1])

    def at(average: float) -> Configuration:
        return tuple(zip(spread_bits(leaves, average, widths[0]), activation, strict=True))

    average = limits.weight_bits or float(
        MAX_BITS if limits.size_bytes is not None else section.weight_bits
    )
    average = within(average, 0)
    if limits.size_bytes is None:
        return at(average)
    steps = np.arange(min(widths[0]), average + 1e-9, 1 / 64)
    fitting = [x for x in steps if costs.cost(at(float(x))).size_bytes <= limits.size_bytes]
    if not fitting:
        least_bits = min(widths[0])
        least = costs.cost(at(float(least_bits))).size_bytes
        raise RecipeError(
            f"search.budget.size_bytes: received {limits.size_bytes}, expected at least {least}, "
            f"which {least_bits} bits and the branches need. Raise it, or lower the branch."
        )
    return at(float(fitting[-1]))


def search_integer_program(context: SearchContext) -> Outcome:
    """Run strategy `integer_programming`."""
    candidates = context.candidates
    nothing: Configuration = (None,) * len(context.leaves)
    alone: list[Configuration] = [
        (*nothing[: leaf.index], pair, *nothing[leaf.index + 1 :])
        for leaf in context.leaves
        for pair in candidates
    ]
    measured = context.measure_network(alone)
    size = len(candidates)
    errors = [measured[leaf.index * size : (leaf.index + 1) * size] for leaf in context.leaves]
    costs = [
        [context.costs.cost((pair,), leaf.index) for pair in candidates] for leaf in context.leaves
    ]
    chosen = solve_assignment(errors, costs, context.budget)
    configuration = tuple(candidates[option] for option in chosen)
    return Outcome(configuration, context.measure_network([configuration])[0])


def search_greedy(context: SearchContext) -> Outcome:
    """Run strategy `greedy`."""
    present: list[Pair] = [context.candidates[-1]] * len(context.leaves)
    error = context.measure_network([tuple(present)])[0]
    steps = _Steps(context)
    heap = steps.measure_first(present, error)
    while not context.allows(tuple(present)):
        _, index, axis = heapq.heappop(heap)
        lowered = steps.lower(present, index, axis)
        if lowered is None or not steps.helps(present, axis):
            continue
        measured = context.measure_network([tuple(lowered)], base=tuple(present))[0]
        score = steps.score(present, lowered, measured - error)
        if heap and score > heap[0][0]:
            heapq.heappush(heap, (score, index, axis))
            continue
        present, error = lowered, measured
        heapq.heappush(heap, (score, index, axis))
    return Outcome(tuple(present), error)


class _Steps:
    """Steps of the greedy search: one leaf's weights (axis 0) or activations (1) one width down."""

    def __init__(self, context: SearchContext) -> None:
        self._context = context
        section = context.section
        self._widths = (
            sorted(set(section.weight_candidates)),
            sorted(set(section.activation_candidates)),
        )

    def lower(self, present: Sequence[Pair], index: int, axis: int) -> list[Pair] | None:
        """Return the configuration after a step, None where there is no smaller width."""
        widths = self._widths[axis]
        at = widths.index(present[index][axis])
        if at == 0:
            return None
        pair = list(present[index])
        pair[axis] = widths[at - 1]
        return [*present[:index], (pair[0], pair[1]), *present[index + 1 :]]

    def helps(self, present: Sequence[Pair], axis: int) -> bool:
        """Whether a limit that the axis counts for is still exceeded."""
        cost, budget = self._context.costs.cost(tuple(present)), self._context.budget
        only_weights = Budget(budget.weight_bits, None, budget.size_bytes)
        only_activations = Budget(None, budget.activation_bits, None)
        return not (only_activations if axis else only_weights).allows(cost)

    def score(self, present: Sequence[Pair], lowered: Sequence[Pair], error: float) -> float:
        """Return the added error over the saved part of the budget."""
        costs, budget = self._context.costs, self._context.budget
        before, after = (sum(budget.relative(costs.cost(tuple(c)))) for c in (present, lowered))
        return error / max(before - after, 1e-300)

    def measure_first(self, present: Sequence[Pair], error: float) -> list[tuple[float, int, int]]:
        """Measure every step from the start; return them as a heap of (score, leaf, axis)."""
        tried = [
            (lowered, index, axis)
            for index in range(len(present))
            for axis in (0, 1)
            if self.helps(present, axis)
            if (lowered := self.lower(present, index, axis)) is not None
        ]
        measured = self._context.measure_network(
            [tuple(lowered) for lowered, _, _ in tried], base=tuple(present)
        )
        heap = [
            (self.score(present, lowered, value - error), index, axis)
            for (lowered, index, axis), value in zip(tried, measured, strict=True)
        ]
        heapq.heapify(heap)
        return heap
