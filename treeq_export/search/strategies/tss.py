"""Strategy `tss`: TreeQ's tree-structured search.

Published: leaves are consecutive layers; neighbours are merged pairwise, bottom up; a merge tries
all pairs of its children's configurations, measures the merged segment end to end, and a Pareto
drop on (average bits, MSE) keeps 16. Ours: what a leaf is, how a segment is run
(measure/segment.py), and which points of a long front are kept (pareto.py): those that spend about
the node's share of the budget, which is found from single leaves (guide.py).

At the root the error is that of the network's output. Its best configurations within the budget,
kept or dropped, are compared once more on other inputs: the least of many measured errors is one
that luck has made small.
"""

import numpy as np

from treeq_export.search.executor import Task
from treeq_export.search.strategies.context import Finalist, Outcome, SearchContext
from treeq_export.search.strategies.guide import Guide, make_guide
from treeq_export.search.strategies.pareto import drop
from treeq_export.search.strategies.refine import refine
from treeq_export.search.tree import Configuration, Node, decode, encode, merge_levels, walk

Measured = tuple[Configuration, float]  # a configuration of a node, and its error


def search_tree_and_refine(context: SearchContext) -> Outcome:
    """Run the search, and refine its choice where the recipe asks for it."""
    outcome = search_tree(context)
    least_gain = context.section.refine
    return outcome if least_gain is None else refine(context, outcome, least_gain)


def search_tree(context: SearchContext) -> Outcome:
    """Run the search; the outcome is deterministic."""
    guide = make_guide(context)
    leaf_choices: list[Configuration] = [(pair,) for pair in context.candidates]
    root = context.network.root
    kept = {node.name: leaf_choices for node, _ in walk(root) if not node.children}
    points: list[Measured] = [(choice, float("nan")) for choice in leaf_choices]
    for level in merge_levels(root):
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
    for task in tasks:
        measured.setdefault(task.node, []).extend(
            (decode(task.prefix) + decode(suffix), values[task.node, task.prefix, suffix])
            for suffix in task.suffixes
        )
    return measured


def _drop(
    context: SearchContext, guide: Guide, node: Node, points: list[Measured]
) -> list[Configuration]:
    costs = np.array(
        [context.budget.fractions(context.costs.cost(inside, node.first)) for inside, _ in points]
    )
    errors = np.array([mse for _, mse in points])
    share = guide.allocation.shares[node.first : node.last + 1].sum(axis=0)
    kept = drop(
        costs, errors, context.section.keep, share, guide.allocation.prices, node.num_leaves
    )
    return [points[index][0] for index in kept]


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
    root, blocks = context.network.root, context.network.blocks
    allowed = [(mse, encode(inside), inside) for inside, mse in points if context.allows(inside)]
    entered = [inside for _, _, inside in sorted(allowed)[: context.section.keep]]
    if guide.optimum not in entered:
        entered.append(guide.optimum)
    errors = context.measure_final(entered)
    ranked = sorted(zip(errors, entered, strict=True), key=lambda at: (at[0], encode(at[1])))
    # A tree that ends before the network, or is a single leaf, has measured no prediction.
    known = dict(points) if root.last_block == len(blocks) - 1 and root.children else {}
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
    kept_at_root = set(kept[root.name])
    front = [
        context.make_point(inside, mse, kept=inside in kept_at_root, chosen=inside == best)
        for inside, mse in points
    ]
    if best not in dict(points):
        front.append(context.make_point(best, network_mse, kept=True, chosen=True))
    sizes = {name: len(configurations) for name, configurations in kept.items()}
    return Outcome(best, network_mse, front, sizes, finalists)
