"""The last step of `tss`: an exchange of bits between leaves, measured on the whole network.

The root offers 16 x 16 combinations, so a few leaves may still be off by one width. From the
configuration that the tree chose, every leaf's neighbouring widths are measured on the network, one
change at a time; an integer program proposes the best exchange within the budget if changes added
up; the proposal is taken only if the error falls on the inputs that finalists are compared on. If
it does not, fewer changes are allowed at once. This step is ours; `search.refine: null` leaves it
out.
"""

from treeq_export.search.strategies.assignment import solve_assignment
from treeq_export.search.strategies.context import Finalist, Outcome, SearchContext
from treeq_export.search.tree import Configuration, Pair, replace_at

_MOST_ROUNDS = 4


def refine(context: SearchContext, outcome: Outcome, least_gain: float) -> Outcome:
    """Return the outcome after all exchanges that lower the network's error.

    Args:
        context: The search's inputs.
        outcome: The outcome of the tree.
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
    (network_mse,) = context.measure_network([best])
    finalist = Finalist(best, network_mse, error)
    return context.choose_instead(outcome, finalist, [finalist, *outcome.finalists])


def _exchange(
    context: SearchContext, present: Configuration, error: float
) -> tuple[Configuration, float] | None:
    """Return a better configuration and its error, None where no exchange lowers it."""
    options: list[list[Pair]] = []
    for pair in present:
        assert pair is not None
        options.append([pair, *_neighbours(context, pair)])
    single = [
        replace_at(present, leaf, other) for leaf, row in enumerate(options) for other in row[1:]
    ]
    before, *after = context.measure_network([present, *single], base=present)
    measured = iter(after)
    errors = [[0.0, *(next(measured) - before for _ in row[1:])] for row in options]
    costs = context.costs_of(options)
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
    candidates = context.candidates
    num_activations = len(set(context.section.activation_candidates))
    num_weights = len(candidates) // num_activations
    at, to = divmod(candidates.index(pair), num_activations)
    steps = ((-1, 0), (0, -1), (0, 1), (1, 0), (-1, 1), (1, -1))
    return [
        candidates[(at + dw) * num_activations + to + da]
        for dw, da in steps
        if 0 <= at + dw < num_weights and 0 <= to + da < num_activations
    ]
