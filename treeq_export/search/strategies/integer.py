"""Strategy `integer_programming`: the least sum of single-leaf errors within the budget.

Each leaf alone is quantized to each candidate; the error is that of the network's prediction.
"""

from treeq_export.search.strategies.assignment import solve_assignment
from treeq_export.search.strategies.context import Outcome, SearchContext
from treeq_export.search.tree import Configuration, replace_at


def search_integer_program(context: SearchContext) -> Outcome:
    """Measure every leaf alone, then choose as if errors added up."""
    candidates, number = context.candidates, len(context.leaves)
    nothing: Configuration = (None,) * number
    measured = context.measure_network(
        [replace_at(nothing, leaf, pair) for leaf in range(number) for pair in candidates]
    )
    size = len(candidates)
    errors = [measured[leaf * size : (leaf + 1) * size] for leaf in range(number)]
    costs = context.costs_of([candidates] * number)
    configuration = tuple(
        candidates[option] for option in solve_assignment(errors, costs, context.budget)
    )
    return Outcome(configuration, context.measure_network([configuration])[0])
