"""Strategy `tss`: TreeQ's tree-structured search.

Published: leaves are consecutive layers; neighbours are merged pairwise, bottom up; a merge tries
all pairs of its children's configurations, measures the merged segment end to end, and a Pareto
drop on (average bits, MSE) keeps 16. Ours: what a leaf is, how a segment is run (segments.py), and
which points of a long front are kept (pareto.py): those that spend about the node's share of the
budget, which is found from single leaves (guide.py).

At the root the error is that of the network's output. Its best configurations within the budget,
kept or dropped, are compared once more on other inputs: the least of many measured errors is one
that luck has made small.
"""

from dataclasses import dataclass

import numpy as np

from treeq_export.search.executor import Task
from treeq_export.search.strategies.context import Finalist, Outcome, SearchContext, make_point
from treeq_export.search.strategies.guide import Guide, make_guide
from treeq_export.search.strategies.pareto import drop
from treeq_export.search.tree import Configuration, Node, encode, merge_levels, walk


@dataclass(frozen=True)
class Measured:
    """A configuration of a node and its error."""

    configuration: Configuration
    mse: float


def search_tree(context: SearchContext) -> Outcome:
    """Run the search.

    Args:
        context: Its inputs.

    Returns:
        The outcome; deterministic.
    """
    guide = make_guide(context)
    leaf_choices: list[Configuration] = [(pair,) for pair in context.candidates]
    kept: dict[str, list[Configuration]] = {
        node.name: leaf_choices for node, _ in walk(context.root) if not node.children
    }
    points: list[Measured] = [Measured(choice, float("nan")) for choice in leaf_choices]
    for level in merge_levels(context.root):
        measured = _measure_level(context, level, kept)
        for node in level:
            points = measured[node.name]
            kept[node.name] = _drop(context, guide, node, points)
    return _choose(context, guide, points, kept)


def _measure_level(
    context: SearchContext, level: list[Node], kept: dict[str, list[Configuration]]
) -> dict[str, list[Measured]]:
    """Measure all pairs of all nodes of a level; they do not depend on each other."""
    tasks: list[Task] = []
    block_runs = 0
    for node in level:
        left, right = (kept[child.name] for child in node.children)
        suffixes = tuple(encode(configuration) for configuration in right)
        tasks += [Task(node.name, encode(prefix), suffixes) for prefix in left]
        span = node.last_block - node.children[1].first_block + 1
        block_runs += len(left) * len(right) * span
    values = context.measure(tasks, block_runs)
    measured: dict[str, list[Measured]] = {}
    for node in level:
        left, right = (kept[child.name] for child in node.children)
        measured[node.name] = [
            Measured(prefix + suffix, values[node.name, encode(prefix), encode(suffix)])
            for prefix in left
            for suffix in right
        ]
    return measured


def _drop(
    context: SearchContext, guide: Guide, node: Node, points: list[Measured]
) -> list[Configuration]:
    configurations = [point.configuration for point in points]
    costs = np.array(
        [context.budget.fractions(context.costs.cost(c, node.first)) for c in configurations]
    )
    errors = np.array([point.mse for point in points])
    share = guide.allocation.shares[node.first : node.last + 1].sum(axis=0)
    kept = drop(
        costs, errors, context.section.keep, share, guide.allocation.prices, node.num_leaves
    )
    return [configurations[index] for index in kept]


def _choose(
    context: SearchContext,
    guide: Guide,
    points: list[Measured],
    kept: dict[str, list[Configuration]],
) -> Outcome:
    """Return the finalist of least error.

    Finalists are the root's best pairs within the budget and the best sum of single leaves. They
    are compared on inputs that nothing was chosen on before.
    """
    allowed = [point for point in points if context.allows(point.configuration)]
    allowed.sort(key=lambda point: (point.mse, encode(point.configuration)))
    entered = [point.configuration for point in allowed[: context.section.keep]]
    if guide.optimum not in entered:
        entered.append(guide.optimum)
    errors = context.measure_final(entered)
    ranked = sorted(zip(errors, entered, strict=True), key=lambda at: (at[0], encode(at[1])))
    # A tree that ends before the network, or is a single leaf, has measured no prediction.
    ends = context.root.last_block == context.num_blocks - 1 and context.root.children
    known = {point.configuration: point.mse for point in points} if ends else {}
    finalists = [
        Finalist(
            configuration,
            known[configuration]
            if configuration in known
            else context.measure_network([configuration])[0],
            final_mse,
        )
        for rank, (final_mse, configuration) in enumerate(ranked)
        if rank < max(context.section.calibrated_finalists, 1) or configuration == guide.optimum
    ]
    best, network_mse = finalists[0].configuration, finalists[0].network_mse
    kept_at_root = set(kept[context.root.name])
    front = [
        make_point(
            context.costs.cost(point.configuration),
            point.mse,
            kept=point.configuration in kept_at_root,
            chosen=point.configuration == best,
        )
        for point in points
    ]
    if not any(point.chosen for point in front):
        front.append(make_point(context.costs.cost(best), network_mse, kept=True, chosen=True))
    sizes = {name: len(configurations) for name, configurations in kept.items()}
    return Outcome(best, network_mse, front, sizes, finalists)
