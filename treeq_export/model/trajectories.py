"""Network inputs along the model's own trajectories, and its answers to them.

What is compared or distilled on whole-network level is compared on these: the samples that the
full-precision model meets while it denoises, with their timesteps and conditioning.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from treeq_export.model.sampler import sample
from treeq_export.model.zoo import Denoiser
from treeq_export.progress import OnStep
from treeq_export.recipe import SamplerSection

Rows = dict[str, Tensor]  # input name -> (rows, ...), in the order of the denoiser's input_names


def collect_rows(
    denoiser: Denoiser,
    section: SamplerSection,
    *,
    num_samples: int,
    num_rows: int | None,
    seed: int,
    on_step: OnStep = lambda _: None,
) -> Rows:
    """Sample trajectories and return network inputs from them, spread over samples and steps.

    Args:
        denoiser: The full-precision model.
        section: Scheduler, steps, guidance, batch size.
        num_samples: Trajectories.
        num_rows: Number of inputs to keep, spread over steps and samples; None is all.
        seed: Seed of the initial noise and of random conditioning.
        on_step: Called with the fraction done, 0..1.

    Returns:
        The inputs, min(num_rows, all) rows; with guidance also those of the unconditional half.
    """
    calls: list[Rows] = []
    total = num_samples * section.steps

    def run(inputs: dict[str, Tensor]) -> Tensor:
        ordered = {name: inputs[name] for name in denoiser.input_names}
        calls.append({name: tensor.clone() for name, tensor in ordered.items()})
        with torch.no_grad():
            return denoiser(*ordered.values())

    sample(
        run,
        denoiser,
        section,
        num=num_samples,
        seed=seed,
        on_step=lambda done: on_step(done / total),
    )
    return join_calls(calls, denoiser.input_names, num_rows, seed)


def join_calls(
    calls: Sequence[Rows], names: Sequence[str], num_rows: int | None, seed: int
) -> Rows:
    """Return the inputs of several network calls as one, thinned to `num_rows` (None is all)."""
    rows = {name: torch.cat([call[name] for call in calls]) for name in names}
    return rows if num_rows is None else thin_rows(rows, num_rows, seed)


def thin_rows(rows: Rows, num_rows: int, seed: int) -> Rows:
    """Return one random row out of each of `num_rows` equal parts, or all where there are not more.

    Every n-th would not do: rows come sample by sample and step by step, and an n that divides the
    samples of a call takes the same few trajectories at every step.

    >>> thin_rows({"x": torch.arange(10)}, 4, seed=0)["x"].tolist()
    [1, 3, 6, 7]
    """
    total = len(next(iter(rows.values())))
    if num_rows >= total:
        return rows
    ends = np.arange(num_rows + 1) * total // num_rows
    index = torch.from_numpy(np.random.default_rng(seed).integers(ends[:-1], ends[1:]))
    return {name: tensor[index] for name, tensor in rows.items()}


@torch.no_grad()
def predict(denoiser: Denoiser, rows: Rows, batch_size: int) -> Tensor:
    """Return the network's prediction for rows, (rows, *sample_shape), in batches."""
    num_rows = len(next(iter(rows.values())))
    return torch.cat(
        [
            denoiser.prediction(
                denoiser(*(rows[n][start : start + batch_size] for n in denoiser.input_names))
            )
            for start in range(0, num_rows, batch_size)
        ]
    )
