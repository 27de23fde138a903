"""Which scheduler a run samples with, and that the pipeline's own one is followed exactly."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from treeq_export.errors import RecipeError
from treeq_export.finetune.pool import schedule_of
from treeq_export.model.pipeline_scheduler import (
    check_scheduler,
    describe_scheduler,
    resolve_scheduler,
)
from treeq_export.pipeline.workspace import Workspace
from treeq_export.recipe import Recipe
from treeq_served.denoise import denoise, make_scheduler
from treeq_served.settings import SamplerSettings

STEPS = 5
# diffusers makes NumPy arrays of tensors in a way that NumPy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def make_pipeline(tiny_checkpoints: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function: scheduler (None is none), family -> a pipeline's folder."""

    def make(scheduler: Any = None, family: str = "dit") -> Path:
        folder = tmp_path / f"pipe-{family}"
        shutil.copytree(tiny_checkpoints / family, folder / "transformer", dirs_exist_ok=True)
        if scheduler is not None:
            scheduler.save_pretrained(folder / "scheduler")
        return folder

    return make


def recipe_of(folder: Path, model: Any = None, finetune: str = "none", **sampler: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "a",
            "model": {"checkpoint": str(folder), **(model or {})},
            "sampler": {"steps": STEPS, **sampler},
            "finetune": {"mode": finetune},
        }
    )


def message_of(recipe: Recipe) -> str:
    with pytest.raises(RecipeError) as caught:
        check_scheduler(resolve_scheduler(recipe))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def predict(inputs: dict[str, Tensor]) -> Tensor:
    return torch.tanh(inputs["sample"]) * (1 + inputs["timestep"][0] / 1000)


def walk(scheduler: Any, noise: Tensor) -> Tensor:
    """Sample as diffusers' pipelines do."""
    x = noise
    for timestep in scheduler.timesteps:
        times = torch.full((len(x),), float(timestep))
        x = scheduler.step(predict({"sample": x, "timestep": times}), timestep, x)[0]
    return x


SCHEDULERS: dict[str, tuple[str, Any]] = {
    "ddim": ("dit", diffusers.DDIMScheduler(beta_schedule="linear")),
    "ddim-v": (
        "dit",
        diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
    ),
    "dpm": ("pixart", diffusers.DPMSolverMultistepScheduler()),
    "dpm-v": (
        "pixart",
        diffusers.DPMSolverMultistepScheduler(prediction_type="v_prediction", solver_order=3),
    ),
    "dpm-flow": (
        "pixart",
        diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0
        ),
    ),
    "flow": ("sd3", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_pipeline_s_scheduler_is_followed(name: str, make_pipeline: Callable[..., Path]):
    family, scheduler = SCHEDULERS[name]
    recipe = resolve_scheduler(recipe_of(make_pipeline(scheduler, family)))
    check_scheduler(recipe)
    assert recipe.sampler.scheduler == "pipeline"
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = type(scheduler).from_config(scheduler.config)
    expected.set_timesteps(STEPS)
    ours = denoise(predict, noise, {}, make_scheduler(recipe.sampler.definition, STEPS))
    assert torch.equal(ours, walk(expected, noise))
    own = denoise(predict, noise, {}, make_scheduler("flow_match_euler", STEPS))
    assert not torch.allclose(ours, own, atol=1e-2)
    described = describe_scheduler(recipe)
    assert described == f"sampler.scheduler: the pipeline's {type(scheduler).__name__}."


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "ddim"])  # it clips
def test_previews_show_what_the_prediction_means(name: str):
    """With a prediction that belongs to a known clean sample, the preview is that sample."""
    _, scheduler = SCHEDULERS[name]
    made = make_scheduler(
        {
            "class_name": type(scheduler).__name__,
            "config": dict(scheduler.config),
            "mu": None,
            "even_sigmas": False,
        },
        STEPS,
    )
    clean = torch.full((1, 4), 0.7)
    noise = torch.tensor([[1.0, -2.0, 0.5, 0.0]])
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    at = 0
    previews = []

    def mix() -> tuple[Tensor, Tensor]:
        if name.startswith("ddim"):
            square = made.alphas_cumprod[int(made.timesteps[at])]
            return square**0.5, (1 - square) ** 0.5
        sigma = made.sigmas[at]
        if kind == "flow_prediction":
            return 1 - sigma, sigma
        alpha = (1 + sigma**2) ** -0.5
        return alpha, alpha * sigma

    def predict_known(inputs: dict[str, Tensor]) -> Tensor:
        alpha, sigma = mix()
        inside = (inputs["sample"] - alpha * clean) / sigma  # the noise that it would have
        if kind == "flow_prediction":
            return inside - clean
        return inside if kind == "epsilon" else alpha * inside - sigma * clean

    def keep(step: int, make: Callable[[], Tensor]) -> None:
        nonlocal at
        at = step
        previews.append(make())

    denoise(predict_known, noise, {}, made, on_step=keep)
    assert len(previews) == STEPS
    for preview in previews:
        assert torch.allclose(preview, clean, atol=1e-3)


def test_flux_shifts_by_the_number_of_tokens(make_pipeline: Callable[..., Path]):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    folder = make_pipeline(scheduler, "flux")
    recipe = resolve_scheduler(recipe_of(folder, {"latent_size": 128}))
    found = recipe.sampler.pipeline_scheduler
    assert found is not None
    assert found.mu == pytest.approx(1.15)  # 4096 tokens
    assert found.even_sigmas
    made = make_scheduler(recipe.sampler.definition, STEPS)
    expected = diffusers.FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    expected.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=found.mu)
    assert torch.equal(made.sigmas, expected.sigmas)
    small = resolve_scheduler(recipe_of(folder, {"latent_size": 32})).sampler.pipeline_scheduler
    assert small is not None
    assert small.mu == pytest.approx(0.5)


def test_a_model_without_pipeline_keeps_the_default(tiny_checkpoints: Path):
    recipe = recipe_of(tiny_checkpoints / "dit")
    assert resolve_scheduler(recipe) is recipe
    assert recipe.sampler.definition == "flow_match_euler"
    assert describe_scheduler(recipe) is None
    said = message_of(recipe_of(tiny_checkpoints / "dit", scheduler="pipeline"))
    assert "has no scheduler/scheduler_config.json" in said


@pytest.mark.parametrize("inside", ["", "transformer"])
def test_the_scheduler_is_found_from_the_model_too(inside: str, make_pipeline: Callable[..., Path]):
    folder = make_pipeline(diffusers.DDIMScheduler())
    assert resolve_scheduler(recipe_of(folder / inside)).sampler.scheduler == "pipeline"


@pytest.mark.parametrize(
    ("given", "scheduler", "words"),
    [
        ("flow_match_euler", diffusers.DDIMScheduler(), ["pipeline's own is DDIMScheduler"]),
        (
            "flow_match_euler",
            diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            ["pipeline's own has shift 3.0"],
        ),
        ("ddim", diffusers.DDIMScheduler(), ["clip_sample True"]),
        ("ddim", diffusers.PNDMScheduler(), ["pipeline's own is PNDMScheduler"]),
        ("flow_match_euler", diffusers.FlowMatchEulerDiscreteScheduler(), []),
        ("ddim", diffusers.DDIMScheduler(clip_sample=False), []),
    ],
)
def test_the_recipe_s_own_word_wins_and_what_differs_is_said(
    given: str, scheduler: Any, words: list[str], make_pipeline: Callable[..., Path]
):
    recipe = recipe_of(make_pipeline(scheduler), scheduler=given)
    assert resolve_scheduler(recipe) is recipe
    check_scheduler(recipe)
    assert recipe.sampler.definition == given
    described = describe_scheduler(recipe)
    assert (described is None) == (not words)
    assert all(word in str(described) for word in words), described


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (diffusers.PNDMScheduler(), ["PNDMScheduler is not supported", "sampler.scheduler"]),
        (diffusers.DDPMScheduler(), ["DDPMScheduler is not supported"]),
        (diffusers.LCMScheduler(), ["LCMScheduler is not supported"]),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
            ["draws random numbers"],
        ),
        (
            diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
            ["draws random numbers", "ddim for a model that predicts noise"],
        ),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(
    scheduler: Any, words: list[str], make_pipeline: Callable[..., Path]
):
    folder = make_pipeline(scheduler)
    said = message_of(recipe_of(folder))
    assert all(word in said for word in ["scheduler_config.json", *words]), said
    resolve_scheduler(recipe_of(folder, scheduler="ddim"))  # the remedy is true


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_damaged_file_is_one_line(content: bytes, make_pipeline: Callable[..., Path]):
    folder = make_pipeline(diffusers.DDIMScheduler())
    (folder / "scheduler" / "scheduler_config.json").write_bytes(content)
    said = message_of(recipe_of(folder))
    assert "scheduler_config.json" in said
    assert "set sampler.scheduler to" in said


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "none"},
        {"num_train_timesteps": "many"},
        {"prediction_type": 3},
        {"beta_start": None, "beta_end": None},
        {"solver_order": "two"},
    ],
)
def test_fields_that_make_no_scheduler_are_one_line(
    changes: dict[str, Any], make_pipeline: Callable[..., Path]
):
    folder = make_pipeline(diffusers.DPMSolverMultistepScheduler())
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert "no DPMSolverMultistepScheduler for 5 steps" in message_of(recipe_of(folder))


def test_a_shift_that_cannot_be_computed_is_one_line(make_pipeline: Callable[..., Path]):
    folder = make_pipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "sd3"
    )
    file = folder / "scheduler" / "scheduler_config.json"
    for changes in ({"max_image_seq_len": 256}, {"base_shift": "low"}):
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        assert "no shift follows from its fields" in message_of(recipe_of(folder))


@pytest.mark.parametrize(
    ("scheduler", "why"),
    [
        (diffusers.DPMSolverMultistepScheduler(), "looks back at earlier steps"),
        (diffusers.DDIMScheduler(), "clips its samples"),
    ],
)
def test_finetune_needs_single_linear_steps(
    scheduler: Any, why: str, make_pipeline: Callable[..., Path]
):
    folder = make_pipeline(scheduler)
    check_scheduler(resolve_scheduler(recipe_of(folder)))
    assert why in message_of(recipe_of(folder, finetune="peft"))


def test_finetune_takes_the_steps_of_a_shifted_flow(make_pipeline: Callable[..., Path]):
    folder = make_pipeline(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "sd3")
    recipe = resolve_scheduler(recipe_of(folder, finetune="peft"))
    check_scheduler(recipe)
    times, coefficients = schedule_of(recipe.sampler)
    sigmas = make_scheduler(recipe.sampler.definition, STEPS).sigmas
    assert torch.allclose(times, 1000 * sigmas[:-1])
    assert torch.allclose(coefficients[:, 0], torch.ones(STEPS))
    assert torch.allclose(coefficients[:, 1], sigmas.diff(), atol=1e-6)


def test_a_run_records_it_and_goes_on_with_it(make_pipeline: Callable[..., Path], tmp_path: Path):
    folder = make_pipeline(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "sd3")
    with Workspace(tmp_path / "run", recipe_of(folder)) as workspace:
        workspace.save()
        first = workspace.recipe.sampler
    shutil.rmtree(folder / "scheduler")
    with Workspace.reopen(tmp_path / "run") as workspace:
        assert workspace.recipe.sampler == first
        assert first.pipeline_scheduler is not None
        assert first.pipeline_scheduler.config["shift"] == 3.0


def test_a_served_sampler_carries_it(make_pipeline: Callable[..., Path]):
    folder = make_pipeline(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "sd3")
    definition = resolve_scheduler(recipe_of(folder)).sampler.definition
    served = json.loads(json.dumps(definition))  # as settings.json holds it
    expected = make_scheduler(definition, STEPS).sigmas
    assert torch.equal(make_scheduler(served, STEPS).sigmas, expected)
    assert "scheduler" in SamplerSettings.__dataclass_fields__
