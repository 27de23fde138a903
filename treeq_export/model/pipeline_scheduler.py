"""The scheduler of the pipeline that a checkpoint belongs to.

A model is trained for one kind of trajectory, so what is sampled for calibration and evaluation has
to follow the scheduler that users sample with. A pipeline's folder says which one that is, in
scheduler/scheduler_config.json. Schedulers whose steps are drawn at random have no part here: full
precision and quantized samples are compared from equal noise.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import torch

from treeq_export.errors import RecipeError
from treeq_export.model.families import find_family
from treeq_export.model.weight_files import CONFIG_FILE, model_folder
from treeq_export.model.zoo import Denoiser
from treeq_export.reading import read_object
from treeq_export.recipe import PipelineScheduler, Recipe
from treeq_served.denoise import DDIM_CONFIG, make_scheduler

SCHEDULER_FILE = "scheduler/scheduler_config.json"
_SUPPORTED: tuple[str, ...] = get_args(PipelineScheduler.model_fields["class_name"].annotation)
_FLOW, _, _MULTISTEP = _SUPPORTED
_OWN = "flow_match_euler for a rectified flow, ddim for a model that predicts noise"
_OWN_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {  # the recipe's
    "flow_match_euler": (_FLOW, {"shift": 1.0, "use_dynamic_shifting": False}),
    "ddim": ("DDIMScheduler", DDIM_CONFIG),
}
_DEFAULTS = {"clip_sample": True}  # of diffusers, for fields of a file; the other ones are as ours


def resolve_scheduler(recipe: Recipe) -> Recipe:
    """Fill in the pipeline's scheduler where the recipe states none.

    Args:
        recipe: A recipe with absolute paths.

    Returns:
        The recipe with sampler.scheduler "pipeline" and its definition; or as it is, where it
        states a scheduler itself or the checkpoint belongs to no pipeline.

    Raises:
        RecipeError: The pipeline's scheduler cannot be read, is of a class that is not supported
            or draws random numbers.
    """
    section = recipe.sampler
    if section.pipeline_scheduler is not None:
        if "scheduler" in section.model_fields_set:
            return recipe
        return _with_sampler(recipe, {"scheduler": "pipeline"})
    if "scheduler" in section.model_fields_set and section.scheduler != "pipeline":
        return recipe
    file = _find_file(recipe)
    if file is None:
        if section.scheduler == "pipeline":
            raise RecipeError(
                f"sampler.scheduler: pipeline, but {recipe.model.checkpoint} has no "
                f"{SCHEDULER_FILE}. Give the pipeline's folder, or set it to {_OWN}."
            )
        return recipe
    made = _read(file, recipe)
    return _with_sampler(recipe, {"scheduler": "pipeline", "pipeline_scheduler": made})


def describe_scheduler(recipe: Recipe) -> str | None:
    """Say which scheduler is used, where a pipeline has one; None where there is nothing to say."""
    section, file = recipe.sampler, _find_file(recipe)
    if section.scheduler == "pipeline" and section.pipeline_scheduler is not None:
        return f"sampler.scheduler: the pipeline's {section.pipeline_scheduler.class_name}."
    if file is None:
        return None
    try:
        raw = _load(file)
    except RecipeError:
        return None  # it is not used
    name, fields = _OWN_SCHEDULERS[section.scheduler]
    found = str(raw.get("_class_name"))
    given = {key: raw.get(key, _DEFAULTS.get(key, own)) for key, own in fields.items()}
    if found != name:
        differs = f"is {found}"
    elif given == fields:
        return None
    else:
        other = [f"{key} {value}" for key, value in given.items() if value != fields[key]]
        differs = "has " + ", ".join(other)
    return (
        f"sampler.scheduler: {section.scheduler} is used, as the recipe says; the pipeline's own "
        f"{differs}. Set it to pipeline to sample as the pipeline does."
    )


def check_scheduler(recipe: Recipe) -> None:
    """Check that the scheduler can be made, and that finetune can train on its steps.

    Raises:
        RecipeError: It cannot.
    """
    section = recipe.sampler
    definition = section.definition
    if isinstance(definition, str):
        return
    name, config = definition["class_name"], definition["config"]
    try:
        made, probe = make_scheduler(definition, section.steps), torch.zeros(1, 1)
        made.step(probe, made.timesteps[0], probe)
    except Exception as error:  # whatever diffusers meets in the fields
        reason = " ".join(str(error).split())
        raise RecipeError(
            f"sampler.pipeline_scheduler: no {name} for {section.steps} steps ({reason}). Correct "
            f"{SCHEDULER_FILE}, or set sampler.scheduler to {_OWN}."
        ) from error
    clips = config.get("clip_sample", name == "DDIMScheduler") or config.get("thresholding", False)
    if recipe.finetune.mode != "none" and (name == _MULTISTEP or (name != _FLOW and clips)):
        why = "looks back at earlier steps" if name == _MULTISTEP else "clips its samples"
        raise RecipeError(
            f"finetune.mode: {recipe.finetune.mode} trains on single linear steps, and the "
            f"pipeline's {name} {why}. Set sampler.scheduler to {_OWN}; or finetune.mode to none."
        )


def _with_sampler(recipe: Recipe, update: Mapping[str, Any]) -> Recipe:
    sampler = recipe.sampler.model_copy(update=update)
    return recipe.model_copy(update={"sampler": sampler})


def _find_file(recipe: Recipe) -> Path | None:
    """Return the pipeline's scheduler_config.json: the checkpoint is the pipeline or its model."""
    folder = model_folder(Path(recipe.model.checkpoint))
    if folder is None:
        return None
    pipeline = folder.parent if folder.name == "transformer" else folder
    file = pipeline / SCHEDULER_FILE
    return file if file.is_file() else None


def _load(file: Path) -> dict[str, Any]:
    remedy = f"Restore it, or set sampler.scheduler to {_OWN}."
    return read_object(file, error=RecipeError, remedy=remedy)


def _read(file: Path, recipe: Recipe) -> PipelineScheduler:
    raw = _load(file)
    name = str(raw.get("_class_name"))
    config = {key: raw[key] for key in sorted(raw) if not key.startswith("_")}
    if config.get("lambda_min_clipped") == -math.inf:
        del config["lambda_min_clipped"]  # the default, for which JSON has no number
    if name not in _SUPPORTED:
        raise RecipeError(
            f"{file}: {name} is not supported, expected {', '.join(_SUPPORTED)}. "
            f"Set sampler.scheduler to {_OWN}."
        )
    if config.get("stochastic_sampling") or "sde" in str(config.get("algorithm_type")):
        raise RecipeError(
            f"{file}: {name} draws random numbers at every step, so that samples cannot be "
            f"compared. Set sampler.scheduler to {_OWN}."
        )
    folder = model_folder(Path(recipe.model.checkpoint))
    model = {} if folder is None else _model_config(folder / CONFIG_FILE)
    family = find_family(str(model.get("_class_name")), str(model.get("norm_type"))) or Denoiser
    try:
        mu = _dynamic_shift(config, model, recipe.model.latent_size, family)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise RecipeError(
            f"{file}: no shift follows from its fields ({error}). Restore it, or set "
            f"sampler.scheduler to {_OWN}."
        ) from error
    return PipelineScheduler.model_validate(
        {
            "class_name": name,
            "config": config,
            "mu": mu,
            "even_sigmas": name == _FLOW
            and family.pipeline_sets_sigmas
            and not config.get("use_flow_sigmas", False),
        }
    )


def _model_config(file: Path) -> dict[str, Any]:
    with suppress(RecipeError):  # whoever opens the checkpoint says so
        return read_object(file, error=RecipeError, remedy="")
    return {}


def _dynamic_shift(
    config: Mapping[str, Any],
    model: Mapping[str, Any],
    latent_size: int | None,
    family: type[Denoiser],
) -> float | None:
    """Return mu, linear in the number of image tokens, as the pipelines of Flux and SD3 do."""
    size = latent_size or model.get("sample_size")
    if not config.get("use_dynamic_shifting") or not isinstance(size, int):
        return None
    tokens = (size // (family.pipeline_patch or int(model.get("patch_size") or 1))) ** 2
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return low + (high - low) * (tokens - few) / (many - few)
