"""The sampling loop of one batch, and its scheduler.

    flow_match_euler   x <- x + (s' - s) v(x, 1000 s),   s = 1, 1 - 1/n, ..., 1/n, 0
    ddim               x0 = (x - sqrt(1 - a) e) / sqrt(a);  x <- sqrt(a') x0 + sqrt(1 - a') e

v and e are the network's prediction; a is the cumulative alpha of 1000 linear betas 1e-4..0.02.
A pipeline's own scheduler is the diffusers class with the pipeline's configuration.
Classifier-free guidance runs both halves as one batch of 2n: e = e_null + g (e_cond - e_null).

treeq-export samples by this file too, so what a server draws is what an evaluation drew.

Sources: Liu et al., Flow Straight and Fast, 2022 (eq. 1); Song et al., DDIM, 2020 (eq. 12, eta 0);
Ho & Salimans, Classifier-Free Diffusion Guidance, 2022 (eq. 6, written as 1 + w = g).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUM_TIMESTEPS = 1000
_PIXEL_CHANNELS = (1, 3)
_FLOW = "FlowMatchEulerDiscreteScheduler"
DDIM_CONFIG = {
    "num_train_timesteps": NUM_TIMESTEPS,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "clip_sample": False,
    "prediction_type": "epsilon",
}

Predict = Callable[[dict[str, Tensor]], Tensor]  # network inputs by name -> noise or velocity
OnStep = Callable[[int, Callable[[], Tensor]], None]


def is_pixels(sample_shape: tuple[int, ...]) -> bool:
    """Return whether samples of this shape are images in [-1, 1], not latents."""
    return len(sample_shape) == 3 and sample_shape[0] in _PIXEL_CHANNELS


def pixels_from_samples(samples: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return images (n, h, w, c) uint8 of samples (n, c, h, w) in [-1, 1]; others are clipped."""
    unit = np.clip((samples + np.float32(1)) / np.float32(2), 0.0, 1.0)
    return np.rint(255 * unit).astype(np.uint8).transpose(0, 2, 3, 1)


def unpacked_shape(sample_shape: Sequence[int]) -> tuple[int, ...]:
    """Return (c, h, w) of one sample; Flux' (tokens, 4c) are the 2 x 2 patches of a square."""
    if len(sample_shape) == 3:
        return tuple(sample_shape)
    tokens, packed = sample_shape
    side = 2 * round(tokens**0.5)
    return packed // 4, side, side


def unpack_samples(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return samples (n, *sample_shape) as (n, c, h, w), see `unpacked_shape`."""
    if samples.ndim == 4:
        return samples
    num = len(samples)
    channels, height, width = unpacked_shape(samples.shape[1:])
    patches = samples.reshape(num, height // 2, width // 2, channels, 2, 2)
    return patches.transpose(0, 3, 1, 4, 2, 5).reshape(num, channels, height, width)


def make_noise(sample_shape: tuple[int, ...], num: int, seed: int) -> Tensor:
    """Return the initial noise (num, *sample_shape), float32; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((num, *sample_shape), generator=generator)


def make_scheduler(scheduler: str | Mapping[str, Any], steps: int) -> Any:
    """Return a fresh diffusers scheduler with its timesteps set.

    Args:
        scheduler: "flow_match_euler", "ddim", or a pipeline's: class_name, config (the fields of
            its scheduler_config.json), mu (dynamic shift, or None) and even_sigmas (whether the
            pipeline itself sets sigma to 1, 1 - 1/n, ..., as Flux' does).
        steps: Number of denoising steps, 1..1000.

    Returns:
        The scheduler.
    """
    import diffusers

    if scheduler == "flow_match_euler":
        scheduler = {
            "class_name": _FLOW,
            "config": {"shift": 1.0},
            "mu": None,
            "even_sigmas": True,
        }
    elif scheduler == "ddim":
        scheduler = {"class_name": "DDIMScheduler", "config": DDIM_CONFIG}
    assert not isinstance(scheduler, str)
    made = getattr(diffusers, scheduler["class_name"]).from_config(dict(scheduler["config"]))
    if scheduler["class_name"] != _FLOW:
        made.set_timesteps(steps)
    elif scheduler["even_sigmas"]:
        sigmas = np.linspace(1, 1 / steps, steps).tolist()
        made.set_timesteps(sigmas=sigmas, mu=scheduler["mu"])
    else:
        made.set_timesteps(steps, mu=scheduler["mu"])
    return made


@torch.no_grad()
def denoise(
    predict: Predict,
    x: Tensor,
    conditioning: Mapping[str, Tensor],
    scheduler: Any,
    *,
    guidance_scale: float = 1.0,
    null_conditioning: Mapping[str, Tensor] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoise one batch from its initial noise.

    Args:
        predict: Calls the network.
        x: Noise, (n, *sample_shape) float32.
        conditioning: Conditioning inputs with n rows.
        scheduler: From `make_scheduler`; used for this batch only.
        guidance_scale: Classifier-free guidance; 1 is none, which runs half as many rows.
        null_conditioning: Conditioning of the unconditional half; needed where there is guidance.
        on_step: Called after every step with the number of steps done, and with a function that
            returns the clean sample as it is predicted there, (n, *sample_shape).

    Returns:
        (n, *sample_shape) float32.
    """
    guided = guidance_scale != 1.0
    if guided:
        null = null_conditioning or {}
        conditioning = {name: torch.cat([conditioning[name], null[name]]) for name in null}
    for index, timestep in enumerate(scheduler.timesteps):
        network_input = torch.cat([x, x]) if guided else x
        inputs = {
            "sample": network_input,
            "timestep": torch.full((len(network_input),), float(timestep)),
            **conditioning,
        }
        predicted = predict(inputs)
        if guided:
            conditional, unconditional = predicted.chunk(2)
            predicted = unconditional + guidance_scale * (conditional - unconditional)
        before = x
        x, *clean = scheduler.step(predicted, timestep, x, return_dict=False)
        if on_step is not None:
            on_step(index + 1, _clean_sample(before, predicted, scheduler, index, clean))
    return x


def _clean_sample(
    before: Tensor, predicted: Tensor, scheduler: Any, index: int, clean: list[Tensor]
) -> Callable[[], Tensor]:
    """Return what computes x0: DDIM's scheduler has it, rectified flow's is x - s v."""

    def compute() -> Tensor:
        if clean:
            return clean[0]
        sigma = float(scheduler.sigmas[index])
        kind = scheduler.config.get("prediction_type", "flow_prediction")
        if kind == "flow_prediction":
            return before - sigma * predicted
        alpha = (1 + sigma**2) ** -0.5  # DPM-Solver counts sigma in units of alpha
        if kind == "epsilon":
            return (before - alpha * sigma * predicted) / alpha
        return alpha * (before - sigma * predicted) if kind == "v_prediction" else predicted

    return compute
