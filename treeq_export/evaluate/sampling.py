"""Samples of every side of an evaluation, from the cache where it has them.

A side is one model: full precision, the quantized one, and a baseline where the recipe asks for
one. All start from equal noise and equal conditioning.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeq_export.evaluate.samples import (
    check_finite,
    digest_denoiser,
    digest_tensors,
    make_fingerprint,
    sample_or_load,
)
from treeq_export.model.sampler import sample
from treeq_export.model.zoo import Denoiser
from treeq_export.progress import OnStep, Say, say_nothing
from treeq_export.recipe import Recipe
from treeq_export.runners.protocols import Runner
from treeq_export.runners.torch_runner import TorchRunner

FP = "fp"
QUANTIZED = "quantized"
BASELINE = "baseline"
LABELS = "class_labels"

Images = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Side:
    """One model of an evaluation.

    Attributes:
        runner: The entered runner of the network.
        source: Digest of everything that its predictions depend on.
        name: Name of the runner, for messages and for the cache.
        folder: Folder in which the samples are cached.
        remedy: Advice for samples that are not finite.
    """

    runner: Runner
    source: str
    name: str
    folder: Path
    remedy: str = (
        "`treeq-export validate` lists every layer's error; give the worst more bits, "
        "or put them into search.exclude."
    )

    def run(self, inputs: dict[str, Tensor]) -> Tensor:
        """Call the network."""
        return torch.from_numpy(self.runner.run(inputs))


def full_precision_side(denoiser: Denoiser, folder: Path) -> Side:
    """Return the side of full precision, in PyTorch."""
    remedy = "Check the checkpoint and the sampler section: nothing is quantized here."
    source = digest_denoiser(denoiser)
    return Side(TorchRunner(denoiser), source, "torch (full precision)", folder, remedy)


def sample_seeds(
    denoiser: Denoiser,
    recipe: Recipe,
    sides: Mapping[str, Side],
    on_step: OnStep,
    say: Say = say_nothing,
) -> Iterator[tuple[int, Images, NDArray[np.int64] | None]]:
    """Yield every seed with the images of all sides, and their labels where the model takes labels.

    Args:
        denoiser: The network that gives shapes and conditioning.
        recipe: The recipe; its sampler and evaluate sections count.
        sides: The sides by name.
        on_step: Called with the fraction done, 0..1.
        say: Told in one line that cached samples are damaged.

    Raises:
        TreeqError: Some images are not finite.
        OutputError: The cache cannot be written.
    """
    section, num = recipe.sampler, recipe.evaluate.num_samples
    share, done = num * section.steps, 0
    total = share * len(sides) * len(recipe.evaluate.seeds)
    for seed in recipe.evaluate.seeds:
        conditioning = denoiser.make_conditioning(num, seed)
        images: Images = {}
        for name, side in sides.items():
            fingerprint = make_fingerprint(
                runner=side.name,
                source=side.source,
                sampler=section.model_dump(mode="json"),
                num=num,
                seed=seed,
                conditioning=digest_tensors(conditioning),
            )
            make = partial(
                sample,
                side.run,
                denoiser,
                section,
                num=num,
                seed=seed,
                conditioning=conditioning,
                on_step=lambda part, before=done: on_step((before + part) / total),
            )
            path = side.folder / f"{name}_seed{seed}.safetensors"
            images[name] = sample_or_load(path, fingerprint, make, say)
            done += share
            on_step(done / total)
            check_finite(images[name], f"{side.name}, seed {seed}", side.remedy)
        labels = conditioning.get(LABELS)
        yield seed, images, None if labels is None else labels.numpy()
