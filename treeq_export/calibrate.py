"""The calibrate stage: fill a plan with codes, scales and branch factors.

1. Trajectories are sampled from the full-precision model itself; no data set is needed. Each
   planned layer's input is rotated and summarised (rms, largest value, kurtosis), and a bounded
   sample of its values is kept for static scales.
2. The branch M is the truncated SVD of each block of W; then the residual W' = (W - M) H_g gets
   the scales of least squared error over a clipping grid.
3. The codes are rounded to nearest, or so that the layer's output error is least (quant/gptq.py).

The statistics go to `calibration.json`: a kurtosis near 3 says that the rotated tokens are close
to the Gaussian for which the token_rms step is optimal.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from treeq_export.artefacts import write_json
from treeq_export.model.quantized import linear_of
from treeq_export.model.sampler import sample
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import LayerPlan, Plan, Tensors, save_plan
from treeq_export.quant.branch import dense_branch, fit_branch
from treeq_export.quant.gptq import quantize_weight_gptq, second_moment
from treeq_export.quant.numerics import activation_step, quantize_weight
from treeq_export.quant.rotation import rotate
from treeq_export.quant.scales import fit_tensor_scale, fit_weight_scale
from treeq_export.recipe import CalibrateSection, Recipe

STATISTICS_FILE = "calibration.json"


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

    def add(self, tokens: NDArray[np.floating], max_kept: int, stride: int) -> None:
        """Add rotated tokens (n, K); every `stride`-th is kept while fewer than `max_kept` are."""
        self.num_tokens += len(tokens)
        self.absmax = max(self.absmax, float(np.abs(tokens).max()))
        square = np.square(tokens, dtype=np.float64)
        mean_square = square.mean(axis=1)
        self.second += float(mean_square.sum())
        fourth = np.square(square).mean(axis=1)
        self.ratio_fourth += float((fourth / np.maximum(mean_square**2, 1e-300)).sum())
        kept = tokens[::stride][: max_kept - self.num_kept]
        if len(kept):
            self.kept.append(kept.copy())
            self.num_kept += len(kept)

    def summary(self) -> dict[str, float | int]:
        """Return the statistics for `calibration.json`."""
        return {
            "num_tokens": self.num_tokens,
            "rms": math.sqrt(self.second / max(self.num_tokens, 1)),
            "absmax": self.absmax,
            "kurtosis": self.ratio_fourth / max(self.num_tokens, 1),
        }


def collect_statistics(
    denoiser: Denoiser, plan: Plan, recipe: Recipe, on_step: Callable[[float], None]
) -> dict[str, InputStatistics]:
    """Sample trajectories and summarise every planned layer's rotated input.

    Args:
        denoiser: The full-precision model.
        plan: The plan; its layers are observed.
        recipe: Its sampler, calibrate and seed settings.
        on_step: Called with the fraction done, 0..1.

    Returns:
        Layer name to statistics.
    """
    statistics = {layer.name: InputStatistics() for layer in plan.layers}
    section = recipe.calibrate
    # Spread the kept tokens over the trajectory: each of the network's calls gives an equal share.
    batches = -(-section.num_samples // recipe.sampler.batch_size)
    per_call = -(-section.max_tokens // (recipe.sampler.steps * batches))

    def observe(layer: LayerPlan) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tokens = inputs[0].detach().reshape(-1, layer.in_features).numpy()
            entry = statistics[layer.name]
            kept = min(entry.num_kept + per_call, section.max_tokens)
            stride = max(1, len(tokens) // per_call)
            entry.add(rotate(tokens, layer.rotation_group), kept, stride)

        return hook

    handles = [
        linear_of(denoiser, layer).register_forward_pre_hook(observe(layer))
        for layer in plan.layers
    ]
    total = section.num_samples * recipe.sampler.steps

    def run(inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return denoiser(*(inputs[name] for name in denoiser.input_names))

    try:
        sample(
            run,
            denoiser,
            recipe.sampler,
            num=section.num_samples,
            seed=recipe.seed,
            on_step=lambda done: on_step(done / total),
        )
    finally:
        for handle in handles:
            handle.remove()
    return statistics


def quantize_layer(
    layer: LayerPlan,
    weight: NDArray[np.floating],
    statistics: InputStatistics,
    section: CalibrateSection,
) -> Tensors:
    """Return one layer's tensors by short name.

    Args:
        layer: Its entry in the plan.
        weight: W, (N, K).
        statistics: Of its rotated input; used by static activation scales and by rounding "gptq".
        section: The recipe's calibrate section.

    Returns:
        codes, weight_scale, and activation_step, branch.R, branch.L where the plan has them.
    """
    tensors: Tensors = {}
    residual = weight
    if layer.branch is not None:
        r_factor, l_factor = fit_branch(weight, layer.branch)
        residual = weight - dense_branch(r_factor, l_factor)
        tensors |= {"branch.R": r_factor, "branch.L": l_factor}
    rotated = rotate(residual, layer.rotation_group)
    bits = layer.weight.bits
    scale = fit_weight_scale(rotated, bits, layer.weight.group_size, section.num_clip_steps)
    if section.rounding == "gptq":
        moment = second_moment(np.concatenate(statistics.kept))
        codes = quantize_weight_gptq(rotated, scale, bits, moment)
    else:
        codes = quantize_weight(rotated, scale, bits)
    tensors |= {"weight_scale": scale, "codes": codes}
    if layer.activation.bits is not None:
        step = activation_step(layer.activation)
        if step is None:
            step = fit_tensor_scale(
                np.concatenate(statistics.kept), layer.activation.bits, section.num_clip_steps
            )
        tensors["activation_step"] = np.array([step], dtype=np.float32)
    return tensors


def run_calibrate(
    run: Path, denoiser: Denoiser, plan: Plan, recipe: Recipe, on_step: Callable[[float], None]
) -> Plan:
    """Fill the plan and write `plan.safetensors`, `plan.json` and `calibration.json`.

    Args:
        run: The run folder.
        denoiser: The full-precision model.
        plan: The plan that search wrote.
        recipe: The recipe.
        on_step: Called with the fraction done, 0..1.

    Returns:
        The plan as written, with the digest of its tensors.

    Raises:
        PlanError: The plan does not fit the model.
        OutputError: The folder cannot be written to.
    """
    statistics = collect_statistics(denoiser, plan, recipe, lambda part: on_step(0.7 * part))
    tensors: Tensors = {}
    for done, layer in enumerate(plan.layers, start=1):
        weight = linear_of(denoiser, layer).weight.detach().numpy()
        short = quantize_layer(layer, weight, statistics[layer.name], recipe.calibrate)
        tensors |= {f"{layer.name}.{name}": value for name, value in short.items()}
        on_step(0.7 + 0.3 * done / len(plan.layers))
    write_json(
        run / STATISTICS_FILE,
        {
            "conditioning": denoiser.conditioning_source,
            "num_samples": recipe.calibrate.num_samples,
            "seed": recipe.seed,
            "layers": {name: entry.summary() for name, entry in statistics.items()},
        },
    )
    return save_plan(run, plan, tensors)
