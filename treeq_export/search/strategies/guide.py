"""Where the budget goes, from what leaves say alone, before the tree starts.

Every candidate of every leaf runs alone, on the clean input of its block; the error is that of the
block's output. One candidate of each leaf, the one nearest to the budget, is measured on the whole
network too, and gives the factor from one error to the other. If errors added up, the linear
program of assignment.py would give the best allocation: each leaf's share of the budget, and the
price of bits, the same everywhere in the network.

The tree keeps, in every node, configurations that spend about the node's share. A segment's own
error cannot tell that share, since it says nothing of what it does to the network. This is ours;
TreeQ says nothing of the kind.
"""

from dataclasses import dataclass

from treeq_export.search.executor import Task
from treeq_export.search.strategies.assignment import Allocation, allocate, solve_assignment
from treeq_export.search.strategies.context import SearchContext
from treeq_export.search.tree import Configuration, Pair, encode, replace_at, walk


@dataclass(frozen=True)
class Guide:
    """What would be best if errors of leaves added up.

    Attributes:
        allocation: Shares and prices.
        optimum: The best configuration of the network; one of the finalists of the search.
    """

    allocation: Allocation
    optimum: Configuration


def make_guide(context: SearchContext) -> Guide:
    """Measure every leaf alone and return how the budget would be spent."""
    errors = measure_alone(context)
    costs = context.costs_of([context.candidates] * len(context.leaves))
    chosen = solve_assignment(errors, costs, context.budget)
    optimum = tuple(context.candidates[option] for option in chosen)
    return Guide(allocate(errors, costs, context.budget), optimum)


def measure_alone(context: SearchContext) -> list[list[float]]:
    """Return about the error of the network's prediction, by leaf and candidate."""
    leaves = [node for node, _ in walk(context.network.root) if not node.children]
    suffixes = tuple(encode((pair,)) for pair in context.candidates)
    local = context.measure(
        [Task(leaf.name, "", suffixes) for leaf in leaves], len(leaves) * len(suffixes)
    )
    anchor = nearest_pair(context)
    nothing: Configuration = (None,) * len(leaves)
    alone = [replace_at(nothing, at, anchor) for at in range(len(leaves))]
    errors: list[list[float]] = []
    for leaf, on_network in zip(leaves, context.measure_network(alone), strict=True):
        factor = on_network / max(local[leaf.name, "", encode((anchor,))], 1e-300)
        errors.append([factor * local[leaf.name, "", suffix] for suffix in suffixes])
    return errors


def nearest_pair(context: SearchContext) -> Pair:
    """Return the candidate that, everywhere, would come nearest to spending the budget."""

    def distance(pair: Pair) -> float:
        spent = context.budget.fractions(context.costs.cost((pair,) * len(context.leaves)))
        return sum(max(part, 1 / part) for part in spent)

    return min(context.candidates, key=distance)
