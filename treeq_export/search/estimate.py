"""What a search will cost, said before it starts."""

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
from treeq_export.search.formats import candidate_pairs
from treeq_export.search.measure.segment import Handler, LinearSwitch
from treeq_export.search.tree import Leaf, count_cost

# Any codes will do for timing.
_NEAREST = CalibrateSection(
    rounding="nearest", num_clip_steps=1, inputs="full_precision", bias_correction=False
)


def time_block(
    denoiser: Denoiser,
    blocks: Sequence[str],
    templates: Sequence[LayerPlan],
    *,
    num_rows: int,
    batch_rows: int,
) -> float:
    """Return the seconds of one evaluation of the first searched block, quantized.

    Args:
        denoiser: The full-precision model.
        blocks: Names of all its blocks.
        templates: One entry per searched layer.
        num_rows: Rows of an evaluation; one batch is timed, three times.
        batch_rows: Rows of one forward pass.
    """
    rows = min(batch_rows, num_rows)
    block = templates[0].tree.block
    inputs = denoiser.make_example_inputs(rows, seed=0)
    outputs: dict[int, Output] = {}
    handlers: dict[str, Handler] = {}
    for layer in templates:
        if layer.tree.block == block:
            linear = linear_of(denoiser, layer)
            weight = linear.weight.detach().numpy()
            any_input = InputStatistics(kept=[np.ones((1, layer.in_features), np.float32)])
            tensors = quantize_layer(layer, weight, any_input, _NEAREST)
            handlers[layer.name] = QLinear(layer, tensors, linear.bias)
    times: list[float] = []
    with BlockReplay(denoiser, blocks) as replay:
        replay.run(inputs, last=block, on_output=outputs.__setitem__)
        with LinearSwitch(denoiser, list(handlers)) as switch:
            switch.handlers = handlers
            for _ in range(3):
                started = perf_counter()
                replay.run(inputs, first=block, last=block, recorded=outputs.__getitem__)
                times.append(perf_counter() - started)
    return min(times) * num_rows / rows


def estimate_cost(
    leaves: Sequence[Leaf],
    section: SearchSection,
    num_blocks: int,
    seconds_per_block: float | None,
) -> SearchCost:
    """Return what a tree search measures and how long that takes.

    Args:
        leaves: The leaves.
        section: Candidates, configurations kept, workers.
        num_blocks: Blocks of the network.
        seconds_per_block: Of `time_block`; None leaves the estimate out.
    """
    counts = count_cost(leaves, len(candidate_pairs(section)), section.keep, num_blocks)
    seconds = None
    if seconds_per_block is not None:
        workers = section.num_workers if section.executor == "ray" else 1
        seconds = counts["num_block_runs"] * seconds_per_block / workers
    return SearchCost(**counts, estimate_s=seconds)


def describe_cost(cost: SearchCost, seconds_per_block: float, num_rows: int) -> str:
    """Return the cost as one line for people."""
    assert cost.estimate_s is not None
    return (
        f"search: {cost.num_leaves} leaves, {cost.num_merges} merges, "
        f"{cost.num_evaluations} evaluations of {num_rows} inputs = {cost.num_block_runs} block "
        f"runs of {1000 * seconds_per_block:.0f} ms: about {_duration(cost.estimate_s)}, "
        "preparation, finalists and refinement not counted"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
