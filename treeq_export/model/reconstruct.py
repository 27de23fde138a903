"""Learned rounding: the codes of one transformer block trained for its full-precision output.

Every weight may be rounded to its level or to the neighbour on the other side of its real value.
The choice is a number v, and while it is trained the level is

    q = floor + gap h(v),    h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)

The loss is the error of the whole block's output on quantized inputs, relative to that before
training, and a term that pushes every h to 0 or 1 as beta falls from 20 to 2:

    L = |y - y_fp|^2 / |y_0 - y_fp|^2 + 3 mean(1 - |2 h - 1|^beta)

So the layers of a block make up for each other. Codes that have not become better than those of
the layer-wise fit are dropped. The last part of the steps trains weight scales, activation steps,
biases and the branch beside hard codes. What comes out are ordinary codes of the plan's format.

Sources: Nagel et al., Up or Down? Adaptive Rounding, 2020 (eqs. 21 to 25); Li et al., BRECQ, 2021
(block by block). Ours: the start between the codes of the layer-wise fit and the real values, the
other parameters, and the plain instead of a Fisher-weighted error.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from treeq_export.model.qlinear import QLinear
from treeq_export.model.quantized import put_module
from treeq_export.model.replay import Output
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import Tensors

_ROUNDING_SHARE = 0.6  # of the steps; the rest trains the other tensors
_FREE_SHARE = 0.2  # of the steps of rounding, before h is pushed to 0 or 1
_BETA_FIRST, _BETA_LAST = 20.0, 2.0
_PUSH = 3.0
# Learning rates, falling as a cosine. That of v lets it travel equally far in however many steps.
_CHOICE_TRAVEL, _CHOICE_RATE_LIMIT = 40.0, 0.5
_OTHER_RATE = 1e-3


@dataclass(frozen=True)
class BlockCall:
    """One recorded call of a block.

    Attributes:
        args: Positional arguments of the block, behind quantized layers.
        kwargs: Keyword arguments of the block.
        target: What full precision returns at this place.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Output


class SoftLinear(nn.Module):
    """Takes the place of a `QLinear` while its rounding is trained.

    Args:
        layer: The fitted layer.
        real_codes: (N, K) the residual weight in units of its scale, before it was rounded.
    """

    def __init__(self, layer: QLinear, real_codes: NDArray[np.float32]) -> None:
        super().__init__()
        self.layer = layer
        self.hard_codes: Tensor | None = None
        weight = layer.layer.weight
        levels = weight.numbers.levels(weight.bits)
        below = np.searchsorted(levels, layer.codes) - (real_codes < layer.codes)
        below = below.clip(0, len(levels) - 2)
        floor, gap = (
            torch.from_numpy(array[below].astype(np.float32))
            for array in (levels, np.diff(levels.astype(np.int16)))
        )
        part = (torch.from_numpy(real_codes) - floor) / gap
        hard = (torch.from_numpy(layer.codes.astype(np.float32)) - floor) / gap
        start = (0.5 * hard + 0.5 * part.clamp(0, 1)).clamp(0.02, 0.98)
        self.register_buffer("floor", floor)
        self.register_buffer("gap", gap)
        self.choice = nn.Parameter(torch.special.logit((start + 0.1) / 1.2))
        self.log_scale = nn.Parameter(torch.zeros_like(layer.weight_scale))
        self.log_step = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(
            torch.zeros(layer.layer.out_features) if layer.bias is None else layer.bias.clone()
        )
        self.branch = copy.deepcopy(layer.branch)
        if self.branch is not None:
            self.branch.requires_grad_(True)

    def fraction(self) -> Tensor:
        """Return h(v), (N, K): 0 is rounded down, 1 up."""
        return (1.2 * torch.sigmoid(self.choice) - 0.1).clamp(0, 1)

    def codes(self) -> Tensor:
        """Return the codes (N, K) as floating point, whole numbers where they are hard."""
        if self.hard_codes is not None:
            return self.hard_codes
        return self._between(self.fraction())

    def _between(self, fraction: Tensor) -> Tensor:
        return self.get_buffer("floor") + self.get_buffer("gap") * fraction

    @torch.no_grad()
    def harden(self) -> None:
        """Let every choice be the nearer one from now on."""
        self.hard_codes = self._between((self.fraction() >= 0.5).float())

    def revert(self) -> None:
        """Use the codes of the layer-wise fit from now on."""
        self.hard_codes = torch.from_numpy(self.layer.codes.astype(np.float32))

    def others(self) -> list[nn.Parameter]:
        """Return what is trained beside hard codes."""
        branch = [] if self.branch is None else list(self.branch.parameters())
        return [self.log_scale, self.log_step, self.bias, *branch]

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., N) of x (..., K)."""
        layer = self.layer
        rotated = layer.rotate(x)
        if layer.activation_step is not None:
            scale = layer.activation_scale(rotated) * self.log_step.exp()
            rotated = layer.quantize(rotated, scale) * scale
        weight_scale = layer.weight_scale * self.log_scale.exp()
        grouped = self.codes().reshape(*weight_scale.shape, -1) * weight_scale[:, :, None]
        y = functional.linear(rotated, grouped.flatten(1), self.bias)
        return y if self.branch is None else y + self.branch(x)

    @torch.no_grad()
    def tensors(self) -> Tensors:
        """Return the layer's tensors by short name; its codes have been made hard."""
        layer = self.layer
        tensors: Tensors = {
            "codes": self.codes().numpy().astype(np.int8),
            "weight_scale": (layer.weight_scale * self.log_scale.exp()).numpy(),
            "bias": self.bias.detach().numpy().copy(),
        }
        if layer.activation_step is not None:
            tensors["activation_step"] = (layer.activation_step * self.log_step.exp()).numpy()
        if self.branch is not None:
            tensors["branch.R"] = self.branch.R.detach().numpy().copy()
            tensors["branch.L"] = self.branch.L.detach().numpy().copy()
        return tensors


def reconstruct_block(
    denoiser: Denoiser,
    block: str,
    real_codes: Mapping[str, NDArray[np.float32]],
    calls: Sequence[BlockCall],
    *,
    num_steps: int,
    seed: int,
) -> dict[str, Tensors]:
    """Train the rounding of one block, and leave it in the model.

    Args:
        denoiser: The working copy; the block's layers are `QLinear`, new ones take their places.
        block: The block's module name.
        real_codes: Layer name to (N, K): the weights to be rounded, in units of their scales.
        calls: The block's inputs and targets; one is a training batch.
        num_steps: Steps of the optimizer.
        seed: Seed of the order of the batches.

    Returns:
        The new tensors of every layer by short name; none where training has not helped.
    """
    module = denoiser.model.get_submodule(block)
    # Not module(...): a replay may have put its own forward there, which ends at this block.
    forward = type(module).forward

    def run(call: BlockCall) -> Output:
        result = forward(module, *call.args, **call.kwargs)
        return result if isinstance(result, tuple) else (result,)

    before = {name: _layer_of(denoiser, name) for name in real_codes}
    start = _mean_errors(run, calls)
    soft = {name: SoftLinear(layer, real_codes[name]) for name, layer in before.items()}
    for name, layer in soft.items():
        put_module(denoiser, name, layer)
    trainer = _Trainer(run, list(soft.values()), calls, start, seed)
    num_rounding = round(_ROUNDING_SHARE * num_steps)
    trainer.train_rounding(num_rounding)
    trainer.train_others(num_steps - num_rounding)
    tensors = {name: layer.tensors() for name, layer in soft.items()}
    for name, short in tensors.items():
        put_module(denoiser, name, QLinear(before[name].layer, short, None))
    if sum(_mean_errors(run, calls)) < sum(start):
        return tensors
    for name, layer in before.items():
        put_module(denoiser, name, layer)
    return {}


def _layer_of(denoiser: Denoiser, name: str) -> QLinear:
    layer = denoiser.model.get_submodule(name)
    assert isinstance(layer, QLinear)
    return layer


class _Trainer:
    """Trains the layers of one block.

    Args:
        run: Runs the block.
        layers: Layers of the block.
        calls: Inputs and targets of the block.
        start: Mean squared error of every output before training.
        seed: Seed of the order of the calls.
    """

    def __init__(
        self,
        run: Callable[[BlockCall], Output],
        layers: Sequence[SoftLinear],
        calls: Sequence[BlockCall],
        start: Sequence[float],
        seed: int,
    ) -> None:
        self.run, self.layers, self.calls, self.start = run, layers, calls, start
        self.generator = torch.Generator().manual_seed(seed)
        self.num_weights = sum(layer.choice.numel() for layer in layers)

    def train_rounding(self, num_steps: int) -> None:
        """Train the choices and make them hard, where that is better than the first codes."""
        rate = min(_CHOICE_TRAVEL / max(num_steps, 1), _CHOICE_RATE_LIMIT)
        self._train([layer.choice for layer in self.layers], rate, num_steps, self._push)
        for layer in self.layers:
            layer.harden()
        if sum(_mean_errors(self.run, self.calls)) > sum(self.start):
            for layer in self.layers:
                layer.revert()

    def train_others(self, num_steps: int) -> None:
        """Train what is beside the codes."""
        parameters = [parameter for layer in self.layers for parameter in layer.others()]
        self._train(parameters, _OTHER_RATE, num_steps, lambda _: torch.zeros(()))

    @torch.enable_grad()
    def _train(
        self,
        parameters: list[nn.Parameter],
        rate: float,
        num_steps: int,
        penalty: Callable[[float], Tensor],
    ) -> None:
        optimizer = torch.optim.Adam(parameters, lr=rate)
        order: list[int] = []
        for step in range(num_steps):
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * rate * (1 + math.cos(math.pi * step / num_steps))
            order = order or torch.randperm(len(self.calls), generator=self.generator).tolist()
            call = self.calls[order.pop()]
            errors = _errors(self.run(call), call.target)
            parts = [e / max(s, 1e-30) for e, s in zip(errors, self.start, strict=True)]
            loss = torch.stack(parts).sum() + penalty(step / num_steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def _push(self, progress: float) -> Tensor:
        """Return the term that pushes every h to 0 or 1."""
        if progress < _FREE_SHARE:
            return torch.zeros(())
        part = (progress - _FREE_SHARE) / (1 - _FREE_SHARE)
        beta = _BETA_FIRST + (_BETA_LAST - _BETA_FIRST) * part
        undecided = [
            (1 - (2 * layer.fraction() - 1).abs().pow(beta)).sum() for layer in self.layers
        ]
        return _PUSH * torch.stack(undecided).sum() / self.num_weights


def _errors(output: Output, target: Output) -> list[Tensor]:
    """Return the mean squared error of every output that is a tensor."""
    return [
        torch.mean(torch.square(x - y))
        for x, y in zip(output, target, strict=True)
        if x is not None and y is not None
    ]


@torch.no_grad()
def _mean_errors(run: Callable[[BlockCall], Output], calls: Sequence[BlockCall]) -> list[float]:
    """Return the mean squared error of every output over all calls."""
    sums = [torch.stack(_errors(run(call), call.target)) for call in calls]
    return torch.stack(sums).mean(dim=0).tolist()
