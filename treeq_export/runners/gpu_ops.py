"""The kernels of `treeq_gpu` as PyTorch operators.

As operators they are opaque to `torch.compile`, which then fuses the network around them without a
break. Triton and the kernels are imported at the first call.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from treeq_gpu import choose

from treeq_export.errors import RunnerError


@cache
def load_launch() -> Any:
    """Return the module `treeq_gpu.launch`.

    Raises:
        RunnerError: Triton is not installed.
    """
    try:
        from treeq_gpu import launch
    except ImportError as error:
        raise RunnerError(
            f"treeq_gpu: cannot be imported ({error}). Run `pip install 'treeq-export[gpu]'`."
        ) from error
    return launch


@torch.library.custom_op("treeq_gpu::quantize_tokens", mutates_args=())
def quantize_tokens(
    x: Tensor, act_bits: int, act_scale: str, act_step: float, rotation_group: int
) -> tuple[Tensor, Tensor]:
    """Return codes (M, KP) int8, in the kernels' order, and scales (M,) float32 of x (..., K)."""
    return load_launch().quantize_tokens(
        x.reshape(-1, x.shape[-1]).contiguous(),
        act_bits=act_bits,
        act_scale=act_scale,
        act_step=act_step,
        rotation_group=rotation_group,
    )


@quantize_tokens.register_fake
def _(
    x: Tensor, act_bits: int, act_scale: str, act_step: float, rotation_group: int
) -> tuple[Tensor, Tensor]:
    m = x.numel() // x.shape[-1]
    codes = x.new_empty((m, choose.padded(x.shape[-1])), dtype=torch.int8)
    return codes, x.new_empty(m, dtype=torch.float32)


@torch.library.custom_op("treeq_gpu::product", mutates_args=())
def product(
    codes: Tensor,
    scale: Tensor,
    planes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    group_size: int,
    in_features: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return (q_x q_w^T * s_w) * s_x + bias + addend, (M, N) in out_dtype."""
    return load_launch().product(
        codes,
        scale,
        planes,
        weight_scale,
        bias,
        None if addend is None else addend.contiguous(),
        weight_bits=planes.shape[0],
        group_size=group_size,
        in_features=in_features,
        out_dtype=out_dtype,
    )


@product.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    planes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    group_size: int,
    in_features: int,
    out_dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((codes.shape[0], planes.shape[1]), dtype=out_dtype)


@torch.library.custom_op("treeq_gpu::monarch", mutates_args=())
def monarch(x: Tensor, r_factor: Tensor, l_factor: Tensor) -> Tensor:
    """Return the branch's (..., N) of x (..., K)."""
    return load_launch().monarch(x.contiguous(), r_factor, l_factor)


@monarch.register_fake
def _(x: Tensor, r_factor: Tensor, l_factor: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], l_factor.shape[0] * l_factor.shape[2]))
