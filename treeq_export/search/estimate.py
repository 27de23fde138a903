"""What a tree search will cost, said before it starts."""

from collections.abc import Sequence
from time import perf_counter

import numpy as np

from treeq_export.model.fit import quantize_layer
from treeq_export.model.qlinear import QLinear
from treeq_export.model.quantized import linear_of
from treeq_export.model.replay import BlockReplay, Output
from treeq_export.model.statistics import InputStatistics
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import LayerPlan
from treeq_export.recipe import CalibrateSection, SearchSection
from treeq_export.records import SearchCost
from treeq_export.search.formats import candidate_pairs, make_templates
from treeq_export.search.measure.bank import Handlers
from treeq_export.search.measure.blocks import LinearSwitch
from treeq_export.search.network import Network
from treeq_export.search.tree import Node, merge_levels

# Any codes will do for timing.
_NEAREST = CalibrateSection(
    rounding="nearest", num_clip_steps=1, inputs="full_precision", bias_correction=False
)


def estimate_cost(
    denoiser: Denoiser, network: Network, section: SearchSection, batch_rows: int
) -> tuple[SearchCost, str]:
    """Return what a tree search measures and how long that takes, and the same in one line.

    Args:
        denoiser: The full-precision model.
        network: The searched layers, with their branches.
        section: Candidates, configurations kept, rows, workers.
        batch_rows: Rows of one forward pass.
    """
    templates = make_templates(network, section)
    seconds = _time_block(denoiser, network, templates, section.num_rows, batch_rows)
    cost = count_cost(network, len(candidate_pairs(section)), section.keep)
    workers = section.num_workers if section.executor == "ray" else 1
    estimate_s = cost.num_block_runs * seconds / workers
    return cost.model_copy(update={"estimate_s": estimate_s}), (
        f"search: {cost.num_leaves} leaves, {cost.num_merges} merges, "
        f"{cost.num_evaluations} evaluations of {section.num_rows} inputs = {cost.num_block_runs} "
        f"block runs of {1000 * seconds:.0f} ms: about {_duration(estimate_s)}, "
        "preparation, finalists and refinement not counted"
    )


def count_cost(network: Network, num_candidates: int, keep: int) -> SearchCost:
    """Count what a tree search measures, before it starts.

    Every candidate of a leaf runs its block, one of them the network from there on (guide.py). A
    merge measures every pair of its children's configurations. A pair inside a block runs that
    block; a pair of blocks runs the right child's blocks. What lies left of it runs once per left
    configuration.

    Args:
        network: The searched layers.
        num_candidates: Candidates of a leaf.
        keep: Configurations that a merge keeps, at most.
    """

    def num_kept(node: Node) -> int:
        if not node.children:
            return num_candidates
        left, right = node.children
        return min(num_kept(left) * num_kept(right), keep)

    leaves = network.leaves
    merges = [node for level in merge_levels(network.root) for node in level]
    evaluations = len(leaves) * (num_candidates + 1)
    block_runs = sum(num_candidates + len(network.blocks) - leaf.block for leaf in leaves)
    for node in merges:
        left, right = (num_kept(child) for child in node.children)
        evaluations += left * right
        prefix = max(node.children[1].first_block - node.first_block, 1)
        suffix = node.last_block - node.children[1].first_block + 1
        block_runs += left * prefix + left * right * suffix
    return SearchCost(
        num_leaves=len(leaves),
        num_merges=len(merges),
        num_evaluations=evaluations,
        num_block_runs=block_runs,
        estimate_s=None,
    )


def _time_block(
    denoiser: Denoiser,
    network: Network,
    templates: Sequence[LayerPlan],
    num_rows: int,
    batch_rows: int,
) -> float:
    """Return the seconds of one evaluation of the first searched block, quantized.

    One batch of at most `batch_rows` rows is timed, three times.
    """
    rows = min(batch_rows, num_rows)
    block = templates[0].tree.block
    inputs = denoiser.make_example_inputs(rows, seed=0)
    outputs: dict[int, Output] = {}
    handlers: Handlers = {}
    for layer in templates:
        if layer.tree.block == block:
            linear = linear_of(denoiser, layer)
            weight = linear.weight.detach().numpy()
            any_input = InputStatistics(kept=[np.ones((1, layer.in_features), np.float32)])
            tensors = quantize_layer(layer, weight, any_input, _NEAREST)
            handlers[layer.name] = QLinear(layer, tensors, linear.bias)
    times: list[float] = []
    with BlockReplay(denoiser, network.blocks) as replay:
        replay.run(inputs, last=block, on_output=outputs.__setitem__)
        with LinearSwitch(denoiser, network) as switch:
            switch.handlers = handlers
            for _ in range(3):
                started = perf_counter()
                replay.run(inputs, first=block, last=block, recorded=outputs.__getitem__)
                times.append(perf_counter() - started)
    return min(times) * num_rows / rows


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
