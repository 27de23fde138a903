"""Statistics and a bounded sample of every layer's rotated input.

Trajectories are sampled from the full-precision model itself; no data set is needed.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from treeq_export.model.quantized import linear_of
from treeq_export.model.sampler import sample
from treeq_export.model.trajectories import Rows
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import LayerPlan
from treeq_export.progress import OnStep
from treeq_export.quant.rotation import rotate
from treeq_export.recipe import Recipe


@dataclass
class InputStatistics:
    """Running statistics of one layer's rotated input.

    Attributes:
        num_tokens: Tokens seen.
        absmax: Largest magnitude.
        second: Sum over tokens of the mean square.
        ratio_fourth: Sum over tokens of mean fourth power over squared mean square.
        kept: A bounded sample of tokens, (n, K) each.
        num_kept: Tokens kept.
    """

    num_tokens: int = 0
    absmax: float = 0.0
    second: float = 0.0
    ratio_fourth: float = 0.0
    kept: list[NDArray[Any]] = field(default_factory=list)
    num_kept: int = 0

    def add(self, tokens: NDArray[np.floating], count: int, rng: np.random.Generator) -> None:
        """Add rotated tokens (n, K); `count` of them at most are kept, drawn at random.

        Every n-th would not do: a stride that divides the tokens of an image keeps one place of it.
        """
        self.num_tokens += len(tokens)
        self.absmax = max(self.absmax, float(np.abs(tokens).max()))
        square = np.square(tokens, dtype=np.float64)
        mean_square = square.mean(axis=1)
        self.second += float(mean_square.sum())
        fourth = np.square(square).mean(axis=1)
        self.ratio_fourth += float((fourth / np.maximum(mean_square**2, 1e-300)).sum())
        if count > 0:
            kept = tokens[_draw(len(tokens), count, rng)]
            self.kept.append(kept)
            self.num_kept += len(kept)

    def thin(self, count: int, seed: int) -> "InputStatistics":
        """Return the same with `count` of the kept tokens at most, drawn at random."""
        if self.num_kept <= count:
            return self
        drawn = _draw(self.num_kept, count, np.random.default_rng(seed))
        return replace(self, kept=[np.concatenate(self.kept)[drawn]], num_kept=count)

    def summary(self) -> dict[str, float | int]:
        """Return the statistics for `calibration.json`."""
        return {
            "num_tokens": self.num_tokens,
            "rms": math.sqrt(self.second / max(self.num_tokens, 1)),
            "absmax": self.absmax,
            "kurtosis": self.ratio_fourth / max(self.num_tokens, 1),
        }


def _draw(total: int, count: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Return the ascending indices of `count` of `total` things, of all where they are fewer."""
    return np.sort(rng.permutation(total)[:count])


def collect_statistics(
    denoiser: Denoiser,
    layers: Sequence[LayerPlan],
    recipe: Recipe,
    on_step: OnStep,
    *,
    max_kept: int | None = None,
    on_inputs: Callable[[Rows], None] = lambda _: None,
) -> dict[str, InputStatistics]:
    """Sample trajectories and summarise every planned layer's rotated input.

    Args:
        denoiser: The full-precision model.
        layers: The layers to observe; their rotation groups count.
        recipe: Recipe, for its sampler, calibrate and seed settings.
        on_step: Called with the fraction done, 0..1.
        max_kept: Tokens to keep of each layer; None is calibrate.max_tokens.
        on_inputs: Called with the network's inputs of every call.

    Returns:
        Layer name to statistics.
    """
    statistics = {layer.name: InputStatistics() for layer in layers}
    section = recipe.calibrate
    max_kept = section.max_tokens if max_kept is None else max_kept
    # Spread the kept tokens over the trajectory: each of the network's calls gives an equal share.
    batches = -(-section.num_samples // recipe.sampler.batch_size)
    per_call = max(1, -(-max_kept // (recipe.sampler.steps * batches)))

    rng = np.random.default_rng(recipe.seed)

    def observe(layer: LayerPlan) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tokens = inputs[0].detach().reshape(-1, layer.in_features).numpy()
            entry = statistics[layer.name]
            count = min(per_call, max_kept - entry.num_kept)
            entry.add(rotate(tokens, layer.rotation_group), count, rng)

        return hook

    total = section.num_samples * recipe.sampler.steps

    def run(inputs: dict[str, Tensor]) -> Tensor:
        on_inputs(inputs)
        with torch.no_grad():
            return denoiser(*(inputs[name] for name in denoiser.input_names))

    with ExitStack() as stack:
        for layer in layers:
            linear = linear_of(denoiser, layer)
            stack.enter_context(linear.register_forward_pre_hook(observe(layer)))
        sample(
            run,
            denoiser,
            recipe.sampler,
            num=section.num_samples,
            seed=recipe.seed,
            on_step=lambda done: on_step(done / total),
        )
    return statistics
