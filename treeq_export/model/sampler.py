"""Sampling loops: rectified flow by Euler steps, and DDIM.

    flow_match_euler   x <- x + (s' - s) v(x, 1000 s),   s = 1, 1 - 1/n, ..., 1/n, 0
    ddim               x0 = (x - sqrt(1 - a) e) / sqrt(a);  x <- sqrt(a') x0 + sqrt(1 - a') e

v and e are the network's prediction; a is the cumulative alpha of 1000 linear betas 1e-4..0.02.
Classifier-free guidance runs both halves as one batch of 2n: e = e_null + g (e_cond - e_null).

Sources: Liu et al., Flow Straight and Fast, 2022 (eq. 1); Song et al., DDIM, 2020 (eq. 12, eta 0);
Ho & Salimans, Classifier-Free Diffusion Guidance, 2022 (eq. 6, written as 1 + w = g).
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treeq_export.model.zoo import NUM_TIMESTEPS, Denoiser
from treeq_export.recipe import SamplerSection

Run = Callable[[dict[str, Tensor]], Tensor]  # denoiser inputs by name -> raw network output


def sample(
    run: Run,
    denoiser: Denoiser,
    section: SamplerSection,
    *,
    num: int,
    seed: int,
    conditioning: Mapping[str, Tensor] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Sample from a network, wherever it runs.

    Args:
        run: Calls the network: the torch denoiser, or a runner of a compiled graph.
        denoiser: Gives shapes, conditioning and the meaning of the output.
        section: Scheduler, steps, guidance, batch size.
        num: Number of samples.
        seed: Seed of the initial noise and of random conditioning.
        conditioning: Conditioning inputs with `num` rows; None takes `denoiser.make_conditioning`.
        on_step: Called after every network call with the number of (sample, step) pairs done, up
            to num * steps.

    Returns:
        (num, *sample_shape) float32; independent of the batch size up to rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((num, *denoiser.sample_shape), generator=generator)
    if conditioning is None:
        conditioning = denoiser.make_conditioning(num, seed)
    done = 0

    def count(num_rows: int) -> None:
        nonlocal done
        done += num_rows
        if on_step is not None:
            on_step(done)

    batches = []
    for start in range(0, num, section.batch_size):
        rows = slice(start, start + section.batch_size)
        batch = {name: tensor[rows] for name, tensor in conditioning.items()}
        batches.append(_sample_batch(run, denoiser, section, noise[rows], batch, count))
    return torch.cat(batches)


@torch.no_grad()
def _sample_batch(
    run: Run,
    denoiser: Denoiser,
    section: SamplerSection,
    x: Tensor,
    conditioning: dict[str, Tensor],
    count: Callable[[int], None],
) -> Tensor:
    """Denoise one batch from its initial noise, with a scheduler of its own."""
    scheduler = make_scheduler(section)
    guided = section.guidance_scale != 1.0
    if guided:
        null = denoiser.null_conditioning(len(x))
        conditioning = {name: torch.cat([conditioning[name], null[name]]) for name in null}
    for timestep in scheduler.timesteps:
        network_input = torch.cat([x, x]) if guided else x
        inputs = {
            "sample": network_input,
            "timestep": torch.full((len(network_input),), float(timestep)),
            **conditioning,
        }
        predicted = denoiser.prediction(run(inputs))
        if guided:
            conditional, unconditional = predicted.chunk(2)
            predicted = unconditional + section.guidance_scale * (conditional - unconditional)
        x = scheduler.step(predicted, timestep, x, return_dict=False)[0]
        count(len(x))
    return x


def make_scheduler(section: SamplerSection) -> Any:
    """Return a fresh diffusers scheduler with its timesteps set.

    Args:
        section: Scheduler name and number of steps.

    Returns:
        FlowMatchEulerDiscreteScheduler or DDIMScheduler.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    if section.scheduler == "flow_match_euler":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / section.steps, section.steps).tolist())
        return scheduler
    scheduler = DDIMScheduler(
        num_train_timesteps=NUM_TIMESTEPS,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
        prediction_type="epsilon",
    )
    scheduler.set_timesteps(section.steps)
    return scheduler
