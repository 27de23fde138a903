"""What a search found, as its record holds it."""

from typing import Any

from treeq_export.records import SearchFinalist, SearchNode
from treeq_export.search.branches import BranchTrial
from treeq_export.search.strategies.context import Outcome, SearchContext
from treeq_export.search.tree import describe, walk


def describe_trial(trial: BranchTrial) -> dict[str, Any]:
    """Return a trial as the record holds it."""
    return trial.branch.model_dump() | {
        "num_parameters": trial.num_parameters,
        "error": trial.error,
        "held_out_error": trial.held_out_error,
    }


def describe_finalists(context: SearchContext, outcome: Outcome) -> list[SearchFinalist]:
    """Return the finalists with what they cost."""
    costs = [context.costs.cost(finalist.configuration) for finalist in outcome.finalists]
    return [
        SearchFinalist(
            weight_bits=cost.average_weight_bits,
            activation_bits=cost.average_activation_bits,
            network_mse=finalist.network_mse,
            final_mse=finalist.final_mse,
            calibrated_mse=finalist.calibrated_mse,
            chosen=finalist.configuration == outcome.configuration,
        )
        for cost, finalist in zip(costs, outcome.finalists, strict=True)
    ]


def describe_tree(context: SearchContext, outcome: Outcome) -> list[SearchNode]:
    """Return the tree with what the chosen configuration spends in each node."""
    if not outcome.kept:
        return []
    nodes: list[SearchNode] = []
    for node, depth in walk(context.root):
        inside = outcome.configuration[node.first : node.last + 1]
        cost = context.costs.cost(inside, node.first)
        nodes.append(
            SearchNode(
                name=describe(node, context.leaves),
                depth=depth,
                first_leaf=node.first,
                last_leaf=node.last,
                num_configurations=outcome.kept[node.name],
                weight_bits=cost.average_weight_bits,
                activation_bits=cost.average_activation_bits,
            )
        )
    return nodes
