"""Fake quantization in PyTorch: the formulas of quant/numerics.py for modules that are trained.

Rounding passes gradients straight through inside the range of the levels.
"""

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from treeq_export.ops import ActScale
from treeq_export.quant.grids import Grid
from treeq_export.quant.numerics import SCALE_FLOOR
from treeq_export.quant.rotation import hadamard
from treeq_export.quant.spec import ActivationFormat


def hadamard_matrix(group: int) -> Tensor:
    """Return the orthonormal Hadamard matrix of order `group`, float32."""
    return torch.from_numpy(hadamard(group).astype(np.float32))


def rotate(x: Tensor, matrix: Tensor) -> Tensor:
    """Return x H_g, (..., K), for the matrix of one group."""
    if len(matrix) == 1:
        return x
    return (x.reshape(*x.shape[:-1], -1, len(matrix)) @ matrix.to(x.dtype)).reshape(x.shape)


def activation_scale(rotated: Tensor, step: Tensor, activation: ActivationFormat) -> Tensor:
    """Return s_x of rotated activations (..., K), as (..., 1)."""
    if activation.scale == ActScale.TOKEN_RMS:
        scale = torch.sqrt(torch.mean(rotated * rotated, dim=-1, keepdim=True)) * step
    elif activation.scale == ActScale.TOKEN_ABSMAX:
        scale = rotated.abs().amax(dim=-1, keepdim=True) * step
    else:
        scale = step.expand(*rotated.shape[:-1], 1)
    return scale.clamp_min(SCALE_FLOOR)


def nearest_level(values: Tensor, grid: Grid, bits: int) -> Tensor:
    """Return the nearest levels as floating point, without gradients; NaN stays NaN."""
    values = values.detach()
    if grid.cells is None:
        return values.clamp(*grid.ends(bits)).round_().add_(0.0)  # no minus zero
    cells = grid.cells(bits)
    cell = torch.floor(values * cells.per_unit).clamp_(cells.first, cells.last)
    index = cell.nan_to_num(nan=0.0).long() - cells.first
    levels = torch.from_numpy(cells.levels).to(values)[index]
    return torch.where(values.isnan(), values, levels)


def pass_through(levels: Tensor, values: Tensor) -> Tensor:
    """Return the levels with the gradient of the values."""
    return levels + (values - values.detach()) if values.requires_grad else levels


class _FakeQuantize(torch.autograd.Function):
    """x_hat = s round(x / s); straight through inside the grid, exact for s.

    The gradient of s is that of learned step sizes (Esser et al., LSQ, 2020, eq. 3).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, grid: Grid, bits: int) -> Tensor:
        scaled = x * (1.0 / scale)
        codes = nearest_level(scaled, grid, bits)
        least, largest = grid.ends(bits)
        ctx.save_for_backward(scaled, codes, (scaled >= least) & (scaled <= largest))
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        scaled, codes, inside = ctx.saved_tensors
        passed = gradient * inside
        slope = (gradient * codes - passed * scaled).sum(dim=-1, keepdim=True)
        return passed, slope, None, None


def fake_quantize(rotated: Tensor, step: Tensor, activation: ActivationFormat) -> Tensor:
    """Return what the codes of rotated activations (..., K) stand for, trainable in both."""
    assert activation.bits is not None
    scale = activation_scale(rotated, step, activation)
    applied = _FakeQuantize.apply(rotated, scale, activation.numbers, activation.bits)
    return cast(Tensor, applied)
