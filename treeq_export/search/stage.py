"""The search stage: discover the layers, ask a strategy for their formats, write the plan.

A strategy is a function of `SearchInputs` that returns one `LayerPlan` per layer in execution
order. It may run the model as often as it likes; it writes nothing.
"""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from treeq_export.errors import CheckpointError, RecipeError
from treeq_export.model.checkpoint import Checkpoint
from treeq_export.model.layers import LinearInfo, discover_linears
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import (
    FORMAT_VERSION,
    LayerPlan,
    ModelRecord,
    Plan,
    StrategyRecord,
    save_plan,
)
from treeq_export.recipe import Recipe
from treeq_export.search.uniform import assign_uniform


@dataclass(frozen=True)
class SearchInputs:
    """What a strategy sees.

    Attributes:
        denoiser: The full-precision model.
        linears: The quantizable layers in execution order, exclusions already removed.
        recipe: The whole recipe; its `search` section holds the strategy's options.
        on_step: Called with the fraction done, 0..1.
    """

    denoiser: Denoiser
    linears: list[LinearInfo]
    recipe: Recipe
    on_step: Callable[[float], None]


def _uniform(inputs: SearchInputs) -> tuple[LayerPlan, ...]:
    return assign_uniform(inputs.linears, inputs.recipe.search)


STRATEGIES: dict[str, Callable[[SearchInputs], tuple[LayerPlan, ...]]] = {"uniform": _uniform}


def select_linears(linears: list[LinearInfo], exclude: list[str]) -> list[LinearInfo]:
    """Return the layers that no glob pattern excludes.

    Raises:
        RecipeError: A pattern matches nothing, or nothing is left.
    """
    for pattern in exclude:
        if not any(fnmatch.fnmatchcase(linear.name, pattern) for linear in linears):
            raise RecipeError(
                f"search.exclude: {pattern!r} matches none of {len(linears)} layers, "
                f"such as {linears[0].name}. Correct or remove the pattern."
            )
    selected = [
        linear
        for linear in linears
        if not any(fnmatch.fnmatchcase(linear.name, pattern) for pattern in exclude)
    ]
    if not selected:
        raise RecipeError("search.exclude: leaves no layer to quantize. Remove a pattern.")
    return selected


def run_search(
    run: Path,
    denoiser: Denoiser,
    checkpoint: Checkpoint,
    recipe: Recipe,
    on_step: Callable[[float], None],
) -> Plan:
    """Choose every layer's formats and write `plan.json`, still without tensors.

    Args:
        run: The run folder.
        denoiser: The full-precision model.
        checkpoint: Where it came from.
        recipe: The recipe.
        on_step: Called with the fraction done, 0..1.

    Returns:
        The plan as written.

    Raises:
        FormatError: A format does not fit a layer.
        CheckpointError: The network has no layer that can be quantized.
        RecipeError: `search.exclude` matches nothing or everything.
    """
    found = discover_linears(denoiser)
    if not found:
        raise CheckpointError(
            f"{checkpoint.path}: no quantizable layer, that is no linear in a transformer block. "
            "Check num_layers in its config.json, or use another checkpoint."
        )
    linears = select_linears(found, recipe.search.exclude)
    inputs = SearchInputs(denoiser, linears, recipe, on_step)
    layers = STRATEGIES[recipe.search.strategy](inputs)
    plan = Plan(
        format_version=FORMAT_VERSION,
        model=ModelRecord(
            name=recipe.name,
            class_name=checkpoint.class_name,
            num_parameters=sum(p.numel() for p in denoiser.model.parameters()),
        ),
        checkpoint_sha256=checkpoint.sha256,
        strategy=StrategyRecord(
            name=recipe.search.strategy, options=recipe.search.model_dump(mode="json")
        ),
        layers=layers,
    )
    on_step(1.0)
    return save_plan(run, plan)
