"""The last step of `tss`: an exchange of bits between leaves, measured on the whole network.

The root offers 16 x 16 combinations, so a few leaves may still be off by one width. From the
configuration that the tree chose, every leaf's neighbouring widths are measured on the network, one
change at a time; an integer program proposes the best exchange within the budget if changes added
up; the proposal is taken only if the error falls on the inputs that finalists are compared on. If
it does not, fewer changes are allowed at once. This step is ours; `search.refine: null` leaves it
out.
"""

from treeq_export.search.formats import Pair
from treeq_export.search.strategies.assignment import solve_assignment
from treeq_export.search.strategies.context import Finalist, Outcome, SearchContext, make_point
from treeq_export.search.tree import Configuration

_MOST_ROUNDS = 4


def refine(context: SearchContext, outcome: Outcome, least_gain: float) -> Outcome:
    """Return the outcome after all exchanges that lower the network's error.

    Args:
        context: The search's inputs.
        outcome: What the tree chose.
        least_gain: Relative fall of the error below which the search ends.
    """
    best: Configuration = outcome.configuration
    known = [finalist.final_mse for finalist in outcome.finalists[:1]]
    (error,) = known or context.measure_final([best])
    for _ in range(_MOST_ROUNDS):
        found = _exchange(context, best, error)
        if found is None:
            break
        gain = 1 - found[1] / error
        best, error = found
        if gain < least_gain:
            break
    if best == outcome.configuration:
        return outcome
    front = [point.model_copy(update={"chosen": False}) for point in outcome.front]
    (network_mse,) = context.measure_network([best])
    front.append(make_point(context.costs.cost(best), network_mse, kept=True, chosen=True))
    finalists = [Finalist(best, network_mse, error), *outcome.finalists]
    return Outcome(best, network_mse, front, outcome.kept, finalists)


def _exchange(
    context: SearchContext, present: Configuration, error: float
) -> tuple[Configuration, float] | None:
    """Return a better configuration and its error, None where no exchange lowers it."""
    options: list[list[Pair]] = []
    single: list[Configuration] = []
    for index, pair in enumerate(present):
        assert pair is not None
        near = _neighbours(context, pair)
        options.append([pair, *near])
        single += [(*present[:index], other, *present[index + 1 :]) for other in near]
    before, *after = context.measure_network([present, *single], base=present)
    measured = iter(after)
    errors = [[0.0, *(next(measured) - before for _ in row[1:])] for row in options]
    costs = [
        [context.costs.cost((pair,), index) for pair in row] for index, row in enumerate(options)
    ]
    most_changes = len(present)
    while most_changes:
        chosen = solve_assignment(errors, costs, context.budget, ([0] * len(present), most_changes))
        changed = sum(option > 0 for option in chosen)
        if changed == 0:
            return None
        proposal = tuple(row[option] for row, option in zip(options, chosen, strict=True))
        (value,) = context.measure_final([proposal])
        if value < error:
            return proposal, value
        most_changes = changed // 2
    return None


def _neighbours(context: SearchContext, pair: Pair) -> list[Pair]:
    """Return the pairs one width up or down in weights or in activations, or both ways at once."""
    weights = sorted(set(context.section.weight_candidates))
    activations = sorted(set(context.section.activation_candidates))
    at, to = weights.index(pair[0]), activations.index(pair[1])
    steps = ((-1, 0), (0, -1), (0, 1), (1, 0), (-1, 1), (1, -1))
    return [
        (weights[at + dw], activations[to + da])
        for dw, da in steps
        if 0 <= at + dw < len(weights) and 0 <= to + da < len(activations)
    ]
