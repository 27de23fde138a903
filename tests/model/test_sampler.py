from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from treeq_export.model.checkpoint import load_model, open_checkpoint
from treeq_export.model.conditioning import make_denoiser
from treeq_export.model.sampler import Run, sample
from treeq_export.model.zoo import Denoiser
from treeq_export.recipe import ModelSection, SamplerSection

SCHEDULERS = ["flow_match_euler", "ddim"]


class Formula(Denoiser):
    """A denoiser that is a formula of its inputs; `label` is its conditioning, null is -1."""

    def __init__(self, formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__(nn.Identity(), (2, 3), {"label": ()})
        self.formula = formula

    def forward(self, *inputs: Tensor) -> Tensor:
        x, timestep, label = inputs
        return self.formula(x, timestep[:, None, None], label[:, None, None])

    def make_conditioning(self, num: int, seed: int) -> dict[str, Tensor]:
        return {"label": torch.arange(float(num)) + seed}

    def null_conditioning(self, num: int) -> dict[str, Tensor]:
        return {"label": -torch.ones(num)}


def runs(denoiser: Denoiser) -> Run:
    def run(inputs: dict[str, Tensor]) -> Tensor:
        assert tuple(inputs) == denoiser.input_names
        return denoiser(*inputs.values())

    return run


def noise_of(num: int, seed: int, *shape: int) -> Tensor:
    return torch.randn((num, *shape), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_deterministic_and_independent_of_batch_size(
    scheduler: str, guidance_scale: float, make_tiny_denoiser: Callable[..., Denoiser]
):
    denoiser = make_tiny_denoiser("dit")

    def images(batch_size: int, seed: int) -> Tensor:
        section = SamplerSection.model_validate(
            {
                "scheduler": scheduler,
                "steps": 4,
                "guidance_scale": guidance_scale,
                "batch_size": batch_size,
            }
        )
        return sample(runs(denoiser), denoiser, section, num=5, seed=seed)

    whole = images(5, seed=3)
    assert whole.shape == (5, 4, 8, 8)
    assert torch.equal(whole, images(5, seed=3))
    for batch_size in (1, 2, 50):
        difference = (whole - images(batch_size, seed=3)).abs().max()
        assert difference < 1e-5 * whole.abs().max()  # an untrained network's images grow by DDIM
    assert (whole - images(5, seed=4)).abs().max() > 0.1


def test_constant_velocity_is_followed_to_its_end():
    denoiser = Formula(lambda x, _, label: torch.zeros_like(x) + label)
    section = SamplerSection(steps=7, batch_size=2)
    images = sample(runs(denoiser), denoiser, section, num=3, seed=0)
    expected = noise_of(3, 0, 2, 3) - torch.arange(3.0)[:, None, None]
    assert (images - expected).abs().max() < 1e-6


def test_velocity_to_a_point_arrives_there():
    """v = (x - a) / s leads from any noise to a; the sum over steps telescopes."""
    denoiser = Formula(lambda x, timestep, _: (x - 0.25) / (timestep / 1000))
    images = sample(runs(denoiser), denoiser, SamplerSection(steps=10), num=4, seed=1)
    assert (images - 0.25).abs().max() < 1e-5


def test_timesteps_of_rectified_flow():
    seen: list[float] = []

    def velocity(x: Tensor, timestep: Tensor, _: Tensor) -> Tensor:
        seen.append(timestep[0].item())
        return torch.zeros_like(x)

    denoiser = Formula(velocity)
    sample(runs(denoiser), denoiser, SamplerSection(steps=4), num=1, seed=0)
    assert seen == pytest.approx([1000.0, 750.0, 500.0, 250.0], rel=1e-6)


def test_guidance_extrapolates_from_null_to_conditional():
    calls: list[list[float]] = []

    def velocity(x: Tensor, _: Tensor, label: Tensor) -> Tensor:
        calls.append(label.flatten().tolist())
        return torch.zeros_like(x) + label

    denoiser = Formula(velocity)
    section = SamplerSection(steps=2, guidance_scale=3.0, batch_size=2)
    images = sample(runs(denoiser), denoiser, section, num=2, seed=5)
    label = torch.tensor([5.0, 6.0])[:, None, None]
    assert (images - (noise_of(2, 5, 2, 3) - (-1 + 3 * (label + 1)))).abs().max() < 1e-4
    assert calls == [[5.0, 6.0, -1.0, -1.0]] * 2


def test_given_conditioning_is_used_row_by_row():
    denoiser = Formula(lambda x, _, label: torch.zeros_like(x) + label)
    label = torch.tensor([4.0, -2.0, 9.0])
    section = SamplerSection(steps=3, batch_size=2)
    images = sample(runs(denoiser), denoiser, section, num=3, seed=0, conditioning={"label": label})
    assert (images - (noise_of(3, 0, 2, 3) - label[:, None, None])).abs().max() < 1e-5


def test_ddim_recovers_a_known_image_from_exact_noise():
    """With e = (x - sqrt(a) x0) / sqrt(1 - a), every DDIM step keeps x0, so the last returns it."""
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)

    def noise(x: Tensor, timestep: Tensor, _: Tensor) -> Tensor:
        a = alphas[timestep.long()]
        return ((x - a.sqrt() * 1.5) / (1 - a).sqrt()).float()

    denoiser = Formula(noise)
    section = SamplerSection(scheduler="ddim", steps=10)
    images = sample(runs(denoiser), denoiser, section, num=2, seed=0)
    assert (images - 1.5).abs().max() < 1e-3  # x0 of 1.5 is not clipped


def test_ddim_equals_the_plain_loop_of_diffusers(make_tiny_denoiser: Callable[..., Denoiser]):
    denoiser = make_tiny_denoiser("dit")
    section = SamplerSection(scheduler="ddim", steps=5)
    images = sample(runs(denoiser), denoiser, section, num=2, seed=7)
    scheduler = DDIMScheduler(clip_sample=False)  # linear betas 1e-4..0.02 are its default
    scheduler.set_timesteps(5)
    x = noise_of(2, 7, 4, 8, 8)
    for timestep in scheduler.timesteps:
        output = denoiser.model(x, timestep=timestep.expand(2), class_labels=torch.arange(2)).sample
        x = scheduler.step(output[:, :4], timestep, x).prev_sample
    assert (images - x).abs().max() < 1e-5


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
def test_progress_counts_images_times_steps(guidance_scale: float):
    denoiser = Formula(lambda x, _, label: x * 0 + label)
    section = SamplerSection(steps=2, batch_size=2, guidance_scale=guidance_scale)
    done: list[int] = []
    sample(runs(denoiser), denoiser, section, num=5, seed=0, on_step=done.append)
    assert done == [2, 4, 6, 8, 9, 10]


def test_trained_digits_are_recognised(digits_folder: Path):
    checkpoint = open_checkpoint(digits_folder / "checkpoint")
    section = ModelSection(checkpoint=str(checkpoint.path))
    denoiser = make_denoiser(load_model(checkpoint), checkpoint, section)
    images = sample(
        runs(denoiser), denoiser, SamplerSection(steps=25, guidance_scale=1.5), num=100, seed=0
    )
    classifier = onnxruntime.InferenceSession(
        digits_folder / "classifier.onnx", providers=["CPUExecutionProvider"]
    )
    (logits,) = classifier.run(["logits"], {"images": images.numpy()})
    accuracy = np.mean(np.argmax(np.asarray(logits), axis=1) == np.arange(100) % 10)
    assert accuracy >= 0.97
