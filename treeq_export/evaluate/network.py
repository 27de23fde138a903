"""Error of a quantized network's prediction on inputs that calibration and search have not seen.

The inputs are those that full precision meets while it denoises, from a seed of their own. Images
tell the same story with more noise: two samplers that drift apart may still draw equally well.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from treeq_export.model.trajectories import Rows, collect_rows, predict
from treeq_export.model.zoo import Denoiser
from treeq_export.recipe import Recipe
from treeq_export.runners.protocols import Runner

SEED_OFFSET = 1000  # calibration and search sample with the recipe's seed itself
MOST_SAMPLES = 64
MOST_ROWS = 1024
_SHARE = 10  # inputs measured to those that sampling the images takes: one in ten at most


@dataclass(frozen=True)
class HeldOut:
    """Held-out inputs and full precision's predictions for them.

    Attributes:
        denoiser: The full-precision model.
        rows: Network inputs.
        expected: (rows, *sample_shape).
        batch_size: Rows per call.
    """

    denoiser: Denoiser
    rows: Rows
    expected: Tensor
    batch_size: int

    @torch.no_grad()
    def measure_mse(self, quantized: Runner) -> float:
        """Return the mean squared error of a quantized model's predictions."""
        total = 0.0
        for start in range(0, len(self.expected), self.batch_size):
            rows = slice(start, start + self.batch_size)
            inputs = {name: tensor[rows] for name, tensor in self.rows.items()}
            received = self.denoiser.prediction(torch.from_numpy(quantized.run(inputs)))
            total += float((received - self.expected[rows]).double().square().sum())
        return total / self.expected.numel()


def collect_held_out(denoiser: Denoiser, recipe: Recipe) -> HeldOut:
    """Sample full-precision trajectories; return inputs from them with their predictions.

    Args:
        denoiser: The full-precision model.
        recipe: The sampler section and the seed; no more trajectories than evaluate.num_samples.
    """
    batch_size = recipe.sampler.batch_size
    sampled = recipe.evaluate.num_samples * recipe.sampler.steps
    rows = collect_rows(
        denoiser,
        recipe.sampler,
        num_samples=min(MOST_SAMPLES, recipe.evaluate.num_samples),
        num_rows=min(MOST_ROWS, max(sampled // _SHARE, 1)),
        seed=recipe.seed + SEED_OFFSET,
    )
    return HeldOut(denoiser, rows, predict(denoiser, rows, batch_size), batch_size)
