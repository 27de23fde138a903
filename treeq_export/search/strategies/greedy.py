"""Strategy `greedy`: from the largest candidates down, the cheapest step first.

A step takes one leaf's weights or activations one width down. The step that costs the least error
per bit saved is taken, measured on the network as it then is. Its error is measured lazily: an old
value is taken as a lower bound, and only the most promising step is measured anew (as in lazy
greedy submodular maximisation, Minoux 1978).
"""

import heapq
from collections.abc import Sequence

from treeq_export.search.budget import Budget
from treeq_export.search.strategies.context import Outcome, SearchContext
from treeq_export.search.tree import Pair


def search_greedy(context: SearchContext) -> Outcome:
    """Lower bits until the budget is met."""
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
        if not (heap and score > heap[0][0]):
            present, error = lowered, measured
        heapq.heappush(heap, (score, index, axis))
    return Outcome(tuple(present), error)


class _Steps:
    """The steps: one leaf's weights (axis 0) or activations (axis 1) one width down."""

    def __init__(self, context: SearchContext) -> None:
        self._context = context
        self._candidates = context.candidates
        self._num_activations = len(set(context.section.activation_candidates))

    def lower(self, present: Sequence[Pair], index: int, axis: int) -> list[Pair] | None:
        """Return the configuration after a step, None where there is no smaller width."""
        at = self._candidates.index(present[index])
        if divmod(at, self._num_activations)[axis] == 0:
            return None
        pair = self._candidates[at - (1 if axis else self._num_activations)]
        return [*present[:index], pair, *present[index + 1 :]]

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
