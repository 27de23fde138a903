"""Samples of every side of an evaluation, from cache where they are there.

A side is one model: full precision, the quantized one, and a baseline where the recipe asks for
one. All start from equal noise and equal conditioning.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeq_export.evaluate.samples import (
    check_finite,
    digest_tensors,
    make_fingerprint,
    sample_or_load,
)
from treeq_export.model.sampler import Run, sample
from treeq_export.model.zoo import Denoiser
from treeq_export.progress import OnStep, Say, say_nothing
from treeq_export.recipe import Recipe
from treeq_export.runners.protocols import Runner

FP = "fp"
QUANTIZED = "quantized"
BASELINE = "baseline"
LABELS = "class_labels"

Images = dict[str, NDArray[np.float32]]

_FULL_PRECISION = "torch (full precision)"


@dataclass(frozen=True)
class Side:
    """One model of an evaluation.

    Attributes:
        run: Calls the network.
        source: Digest of everything that its predictions depend on.
        runner: Name of the runner, for messages and for the cache.
        folder: Folder in which the samples are cached.
        remedy: Advice for samples that are not finite.
    """

    run: Run
    source: str
    runner: str
    folder: Path
    remedy: str


def make_full_precision(denoiser: Denoiser, source: str, folder: Path) -> Side:
    """Return the side of full precision."""

    def run(inputs: dict[str, Tensor]) -> Tensor:
        return denoiser(*(inputs[name] for name in denoiser.input_names))

    remedy = "Check the checkpoint and the sampler section: nothing is quantized here."
    return Side(run, source, _FULL_PRECISION, folder, remedy)


def make_quantized(quantized: Runner, source: str, runner: str, folder: Path) -> Side:
    """Return the side of a quantized model."""

    def run(inputs: dict[str, Tensor]) -> Tensor:
        return torch.from_numpy(quantized.run(inputs))

    remedy = (
        "`treeq-export validate` lists every layer's error; give the worst more bits, "
        "or put them into search.exclude."
    )
    return Side(run, source, runner, folder, remedy)


class Sampling:
    """Samples of all sides for one seed after the other.

    Args:
        denoiser: Gives shapes and conditioning.
        recipe: The recipe; its sampler and evaluate sections count.
        sides: By name.
        on_step: Called with the fraction done, 0..1.
        say: Told in one line that cached samples are damaged.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        recipe: Recipe,
        sides: Mapping[str, Side],
        on_step: OnStep,
        say: Say = say_nothing,
    ) -> None:
        self.say = say
        self.denoiser = denoiser
        self.recipe = recipe
        self.sides = sides
        self.on_step = on_step
        self.num_done = 0

    def sample_seed(self, seed: int) -> tuple[Images, NDArray[np.int64] | None]:
        """Return the images of all sides, and their labels where the model takes labels.

        Raises:
            TreeqError: Some images are not finite.
            OutputError: The cache cannot be written.
        """
        num = self.recipe.evaluate.num_samples
        conditioning = self.denoiser.make_conditioning(num, seed)
        images = {name: self._sample_side(name, seed, conditioning) for name in self.sides}
        labels = conditioning.get(LABELS)
        return images, None if labels is None else labels.numpy()

    def _sample_side(
        self, name: str, seed: int, conditioning: Mapping[str, Tensor]
    ) -> NDArray[np.float32]:
        side = self.sides[name]
        num, section = self.recipe.evaluate.num_samples, self.recipe.sampler
        fingerprint = make_fingerprint(
            runner=side.runner,
            source=side.source,
            sampler=section.model_dump(mode="json"),
            num=num,
            seed=seed,
            conditioning=digest_tensors(conditioning),
        )
        share = num * section.steps
        total = share * len(self.sides) * len(self.recipe.evaluate.seeds)
        before = self.num_done

        def make() -> Tensor:
            return sample(
                side.run,
                self.denoiser,
                section,
                num=num,
                seed=seed,
                conditioning=conditioning,
                on_step=lambda done: self.on_step((before + done) / total),
            )

        path = side.folder / f"{name}_seed{seed}.safetensors"
        samples = sample_or_load(path, fingerprint, make, self.say)
        self.num_done = before + share
        self.on_step(self.num_done / total)
        check_finite(samples, f"{side.runner}, seed {seed}", side.remedy)
        return samples
