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
from treeq_export.ops import LAYER_ATTRIBUTES, LayerFormat


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


# An operator takes numbers and text: a LayerFormat field by field.
_FIELDS = ", ".join(f"{kind.__name__} {name}" for name, kind in LAYER_ATTRIBUTES.items())


def _layer_of(fields: tuple[Any, ...]) -> LayerFormat:
    return LayerFormat.from_attributes(dict(zip(LAYER_ATTRIBUTES, fields, strict=True)))


@torch.library.custom_op(
    "treeq_gpu::quantize_tokens",
    mutates_args=(),
    schema=f"(Tensor x, {_FIELDS}) -> (Tensor, Tensor)",
)
def quantize_tokens(x: Tensor, *fields: Any) -> tuple[Tensor, Tensor]:
    """Return codes (M, KP) int8, in the kernels' order, and scales (M,) float32 of x (..., K).

    Args:
        x: Activations, of a type that the kernels have.
        *fields: Values of `LayerFormat.attributes`.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return load_launch().quantize_tokens(rows, _layer_of(fields))


@quantize_tokens.register_fake
def _(x: Tensor, *_fields: Any) -> tuple[Tensor, Tensor]:
    m = x.numel() // x.shape[-1]
    codes = x.new_empty((m, choose.padded(x.shape[-1])), dtype=torch.int8)
    return codes, x.new_empty(m, dtype=torch.float32)


@torch.library.custom_op(
    "treeq_gpu::product",
    mutates_args=(),
    schema="(Tensor codes, Tensor scale, Tensor planes, Tensor weight_scale, Tensor? bias, "
    f"Tensor? addend, ScalarType out_dtype, {_FIELDS}) -> Tensor",
)
def product(
    codes: Tensor,
    scale: Tensor,
    planes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    out_dtype: torch.dtype,
    *fields: Any,
) -> Tensor:
    """Return (q_x q_w^T * s_w) * s_x + bias + addend, (M, N) in out_dtype."""
    whole = None if addend is None else addend.contiguous()
    tensors = (codes, scale, planes, weight_scale, bias, whole)
    return load_launch().product(*tensors, _layer_of(fields), out_dtype)


@product.register_fake
def _(codes: Tensor, _scale: Tensor, planes: Tensor, *rest: Any) -> Tensor:
    out_dtype = rest[3]
    return codes.new_empty((codes.shape[0], planes.shape[1]), dtype=out_dtype)


@torch.library.custom_op("treeq_gpu::monarch", mutates_args=())
def monarch(x: Tensor, r_factor: Tensor, l_factor: Tensor) -> Tensor:
    """Return the branch's (..., N) of x (..., K)."""
    return load_launch().monarch(x.contiguous(), r_factor, l_factor)


@monarch.register_fake
def _(x: Tensor, r_factor: Tensor, l_factor: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], l_factor.shape[0] * l_factor.shape[2]))
