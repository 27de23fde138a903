"""Fitting all layers of a plan: to clean inputs, or in execution order to what they will meet."""

from functools import partial

from treeq_export.model.fit import fit_layer, quantize_layer
from treeq_export.model.quantized import linear_of
from treeq_export.model.reconstruct import reconstruct_block
from treeq_export.model.sequential import SequentialWalk, arrays_of
from treeq_export.model.statistics import InputStatistics, collect_statistics
from treeq_export.model.trajectories import Rows, join_calls
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import Plan, Tensors
from treeq_export.progress import OnStep
from treeq_export.recipe import Recipe

# Share of the sampling in the time of the stage, for its progress.
_CLEAN_SHARE, _QUANTIZED_SHARE = 0.7, 0.2


def fit_plan(
    denoiser: Denoiser, plan: Plan, recipe: Recipe, on_step: OnStep
) -> tuple[Tensors, dict[str, InputStatistics]]:
    """Return the plan's tensors, and statistics by layer.

    Args:
        denoiser: The full-precision model.
        plan: The plan.
        recipe: Recipe, for its calibrate and sampler sections and the seed.
        on_step: Called with the fraction done, 0..1.
    """
    if recipe.calibrate.inputs == "quantized":
        return _fit_in_order(denoiser, plan, recipe, on_step)
    return _fit_to_clean_inputs(denoiser, plan, recipe, on_step)


def _fit_to_clean_inputs(
    denoiser: Denoiser, plan: Plan, recipe: Recipe, on_step: OnStep
) -> tuple[Tensors, dict[str, InputStatistics]]:
    statistics = collect_statistics(
        denoiser, plan.layers, recipe, lambda part: on_step(_CLEAN_SHARE * part)
    )
    tensors: Tensors = {}
    for done, layer in enumerate(plan.layers, start=1):
        weight, bias = arrays_of(linear_of(denoiser, layer))
        entry = statistics[layer.name]
        short = quantize_layer(layer, weight, entry, recipe.calibrate, bias)
        tensors |= {f"{layer.name}.{name}": value for name, value in short.items()}
        on_step(_CLEAN_SHARE + (1 - _CLEAN_SHARE) * done / len(plan.layers))
    return tensors, statistics


def _fit_in_order(
    denoiser: Denoiser, plan: Plan, recipe: Recipe, on_step: OnStep
) -> tuple[Tensors, dict[str, InputStatistics]]:
    section = recipe.calibrate
    calls: list[Rows] = []
    statistics = collect_statistics(
        denoiser,
        plan.layers,
        recipe,
        lambda part: on_step(_QUANTIZED_SHARE * part),
        max_kept=0,
        on_inputs=lambda inputs: calls.append({k: v.clone() for k, v in inputs.items()}),
    )
    walk = SequentialWalk(
        denoiser,
        plan,
        join_calls(calls, denoiser.input_names, section.num_rows, recipe.seed),
        batch_size=recipe.sampler.batch_size,
        max_tokens=section.max_tokens,
        seed=recipe.seed,
    )
    reconstruct = None
    if section.rounding == "adaround":
        reconstruct = partial(
            reconstruct_block, num_steps=section.reconstruct_steps, seed=recipe.seed
        )
    tensors = walk.run(
        partial(fit_layer, section=section),
        lambda part: on_step(_QUANTIZED_SHARE + (1 - _QUANTIZED_SHARE) * part),
        reconstruct,
    )
    return tensors, statistics
