"""Samples of a network, wherever it runs, in batches; the loop of a batch is in denoise.py."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from treeq_export.model.zoo import Denoiser
from treeq_export.recipe import SamplerSection
from treeq_served.denoise import denoise, make_noise, make_scheduler

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
    noise = make_noise(denoiser.sample_shape, num, seed)
    if conditioning is None:
        conditioning = denoiser.make_conditioning(num, seed)
    done = 0

    def predict(inputs: dict[str, Tensor]) -> Tensor:
        return denoiser.prediction(run(inputs))

    batches = []
    for start in range(0, num, section.batch_size):
        rows = slice(start, start + section.batch_size)
        x = noise[rows]

        def count(_steps: int, _clean: Callable[[], Tensor], size: int = len(x)) -> None:
            nonlocal done
            done += size
            if on_step is not None:
                on_step(done)

        sampled = denoise(
            predict,
            x,
            {name: tensor[rows] for name, tensor in conditioning.items()},
            make_scheduler(section.definition, section.steps),
            guidance_scale=section.guidance_scale,
            null_conditioning=denoiser.null_conditioning(len(x)),
            on_step=count,
        )
        batches.append(sampled)
    return torch.cat(batches)
