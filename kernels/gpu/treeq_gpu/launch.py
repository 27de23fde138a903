"""The kernels as functions of torch tensors: on a GPU, or on the CPU in Triton's interpreter.

Outputs are allocated with torch.empty and nothing waits for the GPU, so a CUDA graph can capture
every call. Kernels outside the written list are compiled at their first use.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from treeq_export.ops import (
    ACT_SCALES,
    MAX_BITS,
    MAX_IN_FEATURES,
    MAX_ROTATION,
    MIN_BITS,
    PACK_WORD,
    LayerFormat,
)
from treeq_gpu import choose
from treeq_gpu import instantiations as inst
from treeq_gpu import monarch as monarch_kernels
from treeq_gpu import qlinear as qlinear_kernels
from treeq_gpu.instantiations import DType, Instantiation
from treeq_gpu.interpreter import repair_bf16
from treeq_gpu.quantize_tokens import quantize_tokens_kernel

DTYPE_NAMES: dict[torch.dtype, DType] = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
}
KERNELS: dict[str, Any] = {
    "quantize_tokens_kernel": quantize_tokens_kernel,
    "qlinear_kernel": qlinear_kernels.qlinear_kernel,
    "qlinear_partials_kernel": qlinear_kernels.qlinear_partials_kernel,
    "finish_kernel": qlinear_kernels.finish_kernel,
    "monarch_in_kernel": monarch_kernels.monarch_in_kernel,
    "monarch_out_kernel": monarch_kernels.monarch_out_kernel,
}
if knobs.runtime.interpret:
    repair_bf16()
INTERPRETED_SMS = 4  # so that small shapes in the interpreter take every path


@cache
def _num_sms(device: torch.device) -> int:
    if device.type == "cpu":
        return INTERPRETED_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count  # pragma: no cover


@cache
def _architecture(device: torch.device) -> str:
    if device.type == "cpu":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)  # pragma: no cover
    return f"sm_{major}{minor}"  # pragma: no cover


def launch(instantiation: Instantiation, grid: choose.Grid, *args: Any) -> None:
    """Launch a kernel on the current stream.

    Args:
        instantiation: The kernel and its compile-time arguments.
        grid: Programs in x, y, z.
        args: Run-time arguments, in the order of its `params`.
    """
    options = instantiation.options(_architecture(args[0].device))
    KERNELS[instantiation.kernel][grid](*args, **instantiation.constants, **options)


def _run(step: choose.Launch, values: Mapping[str, Any]) -> None:
    launch(step.kernel, step.grid, *step.arguments(values).values())


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name}: received {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            f"{'' if tensor.is_contiguous() else ' (strided)'}, expected {wanted} {shape}, "
            f"contiguous. Convert it before the call."
        )


def _check_range(name: str, value: int, ok: bool, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name}: received {value}, expected {expected}. Change the plan's layer.")


def _check_bits(name: str, bits: int) -> None:
    _check_range(name, bits, MIN_BITS <= bits <= MAX_BITS, f"{MIN_BITS}..{MAX_BITS}")


def quantize_tokens(x: Tensor, layer: LayerFormat) -> tuple[Tensor, Tensor]:
    """Rotate and quantize tokens.

    Args:
        x: (M, K) fp16, bf16 or fp32.
        layer: The layer that reads them; activations are quantized, and rotation_group is at most
            MAX_ROTATION.

    Returns:
        Codes (M, KP) int8 in the kernels' column order, and scales (M,) float32.

    Raises:
        ValueError: Shapes, types or ranges are others.
    """
    m, k, group = len(x), layer.in_features, layer.rotation_group
    _check("x", x, (m, k), *DTYPE_NAMES)
    _check_bits("act_bits", layer.act_bits)
    _check_range("in_features", k, 1 <= k <= MAX_IN_FEATURES, f"1..{MAX_IN_FEATURES}")
    divides = group in inst.ROTATION_GROUPS and k % group == 0
    _check_range("rotation_group", group, divides, f"a power of two to {MAX_ROTATION} dividing {k}")
    if layer.act_scale not in ACT_SCALES:
        names = [scale.value for scale in ACT_SCALES]
        raise ValueError(f"act_scale: received {layer.act_scale}, expected one of {names}.")
    codes = torch.empty((m, choose.padded(k)), dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    if m == 0:
        return codes, scale
    dtype = DTYPE_NAMES[x.dtype]
    how = choose.choose_quantize(layer, m, _num_sms(x.device), dtype)
    _run(how, {"x": x, "codes": codes, "scale": scale})
    return codes, scale


def _check_weights(planes: Tensor, layer: LayerFormat) -> None:
    _check_bits("weight_bits", layer.weight_bits)
    k, group = layer.in_features, layer.group_size
    words = choose.ceil_div(k, PACK_WORD)
    _check("planes", planes, (layer.weight_bits, layer.out_features, words), torch.int32)
    fits = group == 0 or (group % PACK_WORD == 0 and k % group == 0)
    _check_range("group_size", group, fits, f"0 or a multiple of {PACK_WORD} dividing {k}")


def product(
    codes: Tensor,
    scale: Tensor,
    planes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    layer: LayerFormat,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return (q_x q_w^T * s_w) * s_x + bias + addend of quantized tokens.

    Args:
        codes: (M, KP) int8, from `quantize_tokens`.
        scale: (M,) float32, from `quantize_tokens`.
        planes: (weight_bits, N, KW) int32.
        weight_scale: (N, G) float32.
        bias: (N,) float32 or None.
        addend: (M, N) of out_dtype or None.
        layer: The layer; group_size is 0 or a multiple of 32.
        out_dtype: fp16, bf16 or fp32.

    Returns:
        (M, N) out_dtype.

    Raises:
        ValueError: Shapes, types or ranges are others.
    """
    m, n = len(codes), layer.out_features
    _check_weights(planes, layer)
    _check("codes", codes, (m, choose.padded(layer.in_features)), torch.int8)
    _check("weight_scale", weight_scale, (n, layer.num_groups), torch.float32)
    if bias is not None:
        _check("bias", bias, (n,), torch.float32)
    if addend is not None:
        _check("addend", addend, (m, n), out_dtype)
    y = torch.empty((m, n), dtype=out_dtype, device=codes.device)
    if m == 0:
        return y
    steps = choose.choose_qlinear(layer, m, _num_sms(codes.device), DTYPE_NAMES[out_dtype])
    values: dict[str, Any] = {
        "codes": codes,
        "planes": planes,
        "act_scale": scale,
        "weight_scale": weight_scale,
        "bias": weight_scale if bias is None else bias,  # any tensor where there is none
        "addend": y if addend is None else addend,
        "y": y,
        "has_bias": int(bias is not None),
        "has_addend": int(addend is not None),
    }
    if len(steps) > 1:
        shape = (choose.num_splits(steps), m, n)
        values["partials"] = torch.empty(shape, dtype=torch.int32, device=codes.device)
    for step in steps:
        _run(step, values)
    return y


def qlinear(
    x: Tensor,
    planes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    layer: LayerFormat,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return `treeq::QLinear` of x; the tensors are the op's inputs.

    Args:
        x: (..., K) fp16, bf16 or fp32.
        planes: (weight_bits, N, KW) int32.
        weight_scale: (N, G) float32.
        bias: (N,) float32 or None.
        addend: (..., N) of out_dtype or None.
        layer: Layer for `quantize_tokens` and `product`.
        out_dtype: Type of the result; None is that of x.

    Returns:
        (..., N).

    Raises:
        ValueError: Shapes, types or ranges are others.
    """
    n, k = layer.out_features, layer.in_features
    _check("x", x, (*x.shape[:-1], k), *DTYPE_NAMES)
    _check_weights(planes, layer)
    codes, scale = quantize_tokens(x.reshape(-1, k), layer)
    rows = None if addend is None else addend.reshape(-1, n)
    y = product(codes, scale, planes, weight_scale, bias, rows, layer, out_dtype or x.dtype)
    return y.reshape(*x.shape[:-1], n)


def integer_sums(
    codes: Tensor, planes: Tensor, layer: LayerFormat, shape_class: str | None = None
) -> Tensor:
    """Return the exact int32 sums, to compare with `numerics.accumulate` bit for bit.

    Args:
        codes: (M, KP) int8, from `quantize_tokens`.
        planes: (weight_bits, N, KW) int32.
        layer: Layer for `product`.
        shape_class: "token", "small" or "wide"; None chooses as `qlinear` does, without slices.

    Returns:
        (M, N) int32, or (M, G, N) where grouped.

    Raises:
        ValueError: Shapes, types or ranges are others.
    """
    m, n, k = len(codes), layer.out_features, layer.in_features
    _check_weights(planes, layer)
    _check("codes", codes, (m, choose.padded(k)), torch.int8)
    step = choose.group_step(layer.group_size)
    name = shape_class or choose.shape_class_of(m, n, _num_sms(codes.device))
    kernel = inst.qlinear(layer.weight_bits, name, "fp16", step, sums=True)
    num_steps = k // step if step else 1
    sums = torch.empty((m, num_steps, n), dtype=torch.int32, device=codes.device)
    grid = (choose.num_tiles(m, n, name, step), 1, 1)
    unused = torch.empty(1, dtype=torch.float32, device=codes.device)
    half = unused.to(torch.float16)
    launch(
        kernel,
        grid,
        *(codes, planes, unused, unused, unused, half, sums, m, n, codes.shape[1]),
        *(planes.shape[2], num_steps, 0, 0),
    )
    if not layer.group_size:
        return sums[:, 0]
    return sums.reshape(m, layer.num_groups, -1, n).sum(dim=2, dtype=torch.int32)


def monarch(x: Tensor, R: Tensor, L: Tensor) -> Tensor:  # noqa: N803  the op's names
    """Return `treeq::Monarch` of x.

    Args:
        x: (..., K) fp16, bf16 or fp32.
        R: (b_in, K/b_in, b_out*r), type of x.
        L: (b_out, b_in*r, N/b_out), type of x.

    Returns:
        (..., N), type of x.

    Raises:
        ValueError: Shapes or types are others.
    """
    b_in, block_in, width = R.shape
    b_out, inner, block_out = L.shape
    if width * b_in != inner * b_out or width % b_out:
        raise ValueError(
            f"R, L: received {tuple(R.shape)}, {tuple(L.shape)}, expected (b_in, K/b_in, b_out*r) "
            f"and (b_out, b_in*r, N/b_out). Take both from one plan."
        )
    rank = width // b_out
    _check("x", x, (*x.shape[:-1], b_in * block_in), *DTYPE_NAMES)
    _check("R", R, (b_in, block_in, width), x.dtype)
    _check("L", L, (b_out, inner, block_out), x.dtype)
    m = x.numel() // (b_in * block_in)
    y = torch.empty((*x.shape[:-1], b_out * block_out), dtype=x.dtype, device=x.device)
    if m == 0:
        return y
    z = torch.empty((m, b_out, inner), dtype=x.dtype, device=x.device)
    dtype = DTYPE_NAMES[x.dtype]
    for step in choose.choose_monarch(m, block_in, b_in, b_out, rank, block_out, dtype):
        _run(step, {"x": x, "R": R, "L": L, "z": z, "y": y})
    return y
