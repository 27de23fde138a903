"""Quantized linears that run the Triton kernels of `treeq_gpu`, in the place of `QLinear` modules.

The network around them is cast to fp16 or bf16. What must not be cast stays: planes are int32, the
scales and biases of a quantized linear float32 whatever the network's type, because a sum is scaled
in float32 and rounded once. Branch factors take the network's type.

Layers that read the same tensor with the same format, such as q, k and v, share its codes.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from treeq_export.errors import RunnerError
from treeq_export.model.qlinear import QLinear
from treeq_export.model.quantized import put_module, quantized_layers
from treeq_export.model.zoo import Denoiser
from treeq_export.ops import MAX_ROTATION, PACK_WORD
from treeq_export.plan import LayerPlan
from treeq_export.quant.grids import INTEGER
from treeq_export.quant.numerics import dequantize_weight
from treeq_export.quant.rotation import rotate
from treeq_export.runners import gpu_ops

Codes = tuple[Tensor, Tensor]


class SharedCodes:
    """The codes of the tensor that was quantized last, for the next layer that reads it too."""

    def __init__(self) -> None:
        self._x: Tensor | None = None
        self._key: tuple[Any, ...] = ()
        self._codes: Codes | None = None

    def get(self, x: Tensor, key: tuple[Any, ...], quantize: Callable[[], Codes]) -> Codes:
        """Return the codes of x in the format `key`, quantized only where they are not at hand."""
        if not torch.compiler.is_compiling():  # which writes to no tensor that was read
            key = (*key, x._version)
        if self._codes is None or self._x is not x or self._key != key:
            self._x, self._key, self._codes = x, key, quantize()
        return self._codes

    def clear(self) -> None:
        """Forget the tensor, so that its memory can be freed."""
        self._x, self._codes = None, None


class GpuQLinear(nn.Module):
    """A quantized linear with its branch, by the Triton kernels.

    Args:
        plan: Format of the layer; its activation is quantized.
        tensors: planes (bits, N, K/32) int32 and weight_scale (N, G) float32; bias (N,) and the
            factors R and L, or None.
        step: The activation's step.
        shared: Codes that layers of one network share.

    Raises:
        RunnerError: The kernels do not have this format.
    """

    planes: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    R: Tensor | None
    L: Tensor | None

    def __init__(
        self,
        plan: LayerPlan,
        tensors: Mapping[str, Tensor | None],
        step: float,
        shared: SharedCodes | None = None,
    ) -> None:
        super().__init__()
        check_supported(plan)
        self.plan = plan
        self.shared = shared or SharedCodes()
        self.format = plan.layer_format(step)
        # Plain values: torch.compile has to read them, and the operators to take them.
        self.out_features = plan.out_features
        self._codes_key = tuple(map(str, self.format.codes_key))
        self._fields = tuple(self.format.attributes().values())
        for name in ("planes", "weight_scale", "bias", "R", "L"):
            self.register_buffer(name, tensors.get(name))

    @classmethod
    def of(cls, layer: QLinear, shared: SharedCodes | None = None) -> Self:
        """Return the layer that computes what a reference layer does."""
        branch = layer.branch
        tensors = {
            "planes": layer.planes,
            "weight_scale": layer.weight_scale.detach().float(),
            "bias": None if layer.bias is None else layer.bias.detach().float(),
            "R": None if branch is None else branch.R.detach(),
            "L": None if branch is None else branch.L.detach(),
        }
        return cls(layer.layer, tensors, layer.step, shared)

    def place(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Move to a device; only the branch is cast."""
        for name, tensor in self.named_buffers():
            cast = dtype if name in ("R", "L") else tensor.dtype
            setattr(self, name, tensor.to(device, cast).contiguous())
        return self

    def quantize(self, x: Tensor) -> Codes:
        """Return codes (M, KP) int8, in the kernels' order, and scales (M,) of x (..., K)."""
        return self.shared.get(
            x, self._codes_key, lambda: gpu_ops.quantize_tokens(x, *self._fields)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., N) in x's type of x (..., K)."""
        addend = None
        if self.R is not None and self.L is not None:
            addend = gpu_ops.monarch(x, self.R, self.L).reshape(-1, self.out_features)
        codes, scale = self.quantize(x)
        tensors = (codes, scale, self.planes, self.weight_scale, self.bias, addend)
        y = gpu_ops.product(*tensors, x.dtype, *self._fields)
        return y.reshape(*x.shape[:-1], self.out_features)

    def sums(self, codes: Tensor) -> Tensor:
        """Return the int32 sums (M, G, N) of codes from `quantize`."""
        sums = gpu_ops.load_launch().integer_sums(codes, self.planes, self.format)
        return sums if sums.ndim == 3 else sums[:, None]


def check_supported(layer: LayerPlan) -> None:
    """Check that the kernels have a layer's format.

    Raises:
        RunnerError: They do not.
    """
    group, rotation = layer.weight.group_size, layer.rotation_group
    for grid in (layer.weight.grid, layer.activation.grid):
        if grid != INTEGER.name:
            raise RunnerError(
                f"{layer.name}: grid {grid}, expected {INTEGER.name} for the GPU kernels. "
                "Search again with another grid."
            )
    if group is not None and group % PACK_WORD:
        raise RunnerError(
            f"{layer.name}: group_size {group}, expected a multiple of {PACK_WORD} for the GPU "
            "kernels. Search again with another group_size."
        )
    if rotation > MAX_ROTATION:
        raise RunnerError(
            f"{layer.name}: rotation_group {rotation}, expected at most {MAX_ROTATION} for the GPU "
            f"kernels. Search again with search.rotation_group {MAX_ROTATION}."
        )


def make_dequantized(layer: QLinear) -> nn.Module:
    """Return a plain linear with a weight-only layer's dequantized weight, and its branch."""
    n, k = layer.layer.out_features, layer.layer.in_features
    weight = dequantize_weight(layer.codes, layer.weight_scale.detach().numpy())
    linear = nn.Linear(k, n, bias=layer.bias is not None)
    # H_g is its own inverse: the rotated weight on the rotated input is the weight on the input.
    rotated = rotate(weight, layer.layer.rotation_group).astype(np.float32)
    linear.weight = nn.Parameter(torch.from_numpy(rotated), requires_grad=False)
    if layer.bias is not None:
        linear.bias = layer.bias
    return linear if layer.branch is None else WithBranch(linear, layer.branch)


class WithBranch(nn.Module):
    """A linear and a Monarch branch beside it."""

    def __init__(self, linear: nn.Module, branch: nn.Module) -> None:
        super().__init__()
        self.linear, self.branch = linear, branch

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., N) of x (..., K)."""
        return self.linear(x) + self.branch(x)


def make_gpu_model(quantized: Denoiser, device: torch.device, dtype: torch.dtype) -> Denoiser:
    """Return a copy of a fake-quantized model that runs the kernels.

    Args:
        quantized: With `QLinear` modules; it is left as it is.
        device: Device of the copy.
        dtype: Type of all of it but the quantized linears' codes and scales.

    Raises:
        RunnerError: A layer's format is not supported, or Triton is missing.
    """
    tensors = (*quantized.parameters(), *quantized.buffers())
    model = copy.deepcopy(quantized, {id(tensor): tensor for tensor in tensors})
    shared = SharedCodes()
    for name, layer in quantized_layers(model).items():
        weight_only = layer.layer.activation.bits is None
        made = make_dequantized(layer) if weight_only else GpuQLinear.of(layer, shared)
        put_module(model, name, made)
    _place(model, device, dtype)
    return model.eval()


def _place(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move and cast a module's tensors; they are replaced, since another model may share them."""
    if isinstance(module, GpuQLinear):
        module.place(device, dtype)
        return
    for name, tensor in module.named_parameters(recurse=False):
        cast = nn.Parameter(_cast(tensor.detach(), device, dtype), requires_grad=False)
        module.register_parameter(name, cast)
    for name, tensor in module.named_buffers(recurse=False):
        module._buffers[name] = _cast(tensor, device, dtype)
    for child in module.children():
        _place(child, device, dtype)


def _cast(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


def gpu_layers(model: nn.Module) -> Iterator[tuple[str, GpuQLinear]]:
    """Yield the layers that run the kernels, with their names in the model."""
    for name, module in model.named_modules():
        if isinstance(module, GpuQLinear):
            yield name, module


def channel_order(codes: Tensor, in_features: int) -> Tensor:
    """Return codes (M, K) in the order of the channels.

    Args:
        codes: (M, KP) int8 in the kernels' order: inside 32, position 4*i + j is channel 8*j + i.
        in_features: K.

    >>> channel_order(torch.arange(32)[None], 32)[0, :10].tolist()
    [0, 4, 8, 12, 16, 20, 24, 28, 1, 5]
    """
    words = codes.reshape(len(codes), -1, 8, 4)
    return words.transpose(-1, -2).reshape(codes.shape)[:, :in_features]
