"""The quantized linear as a module: fake-quantized in PyTorch, `treeq::QLinear` when exported.

The forward pass computes the arithmetic of quant/numerics.py with exact integer sums: products of
codes are summed in float32 where no partial sum can reach 2^24, in float64 otherwise. Rounding
and clipping of activations pass gradients straight through inside the clipping range, so that
branch factors and scales can be trained while the weight codes stay frozen.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from treeq_export.model import fake_quant
from treeq_export.model.monarch import Monarch
from treeq_export.plan import LayerPlan
from treeq_export.quant.grids import grid_attributes
from treeq_export.quant.packing import pack, unpack

_EXACT_FLOAT32 = 1 << 24


class QLinear(nn.Module):
    """A linear layer with low-bit weights and activations, and an optional Monarch branch.

    Args:
        layer: The layer's entry in the plan.
        tensors: The layer's tensors by short name: codes (N, K) int8, weight_scale (N, G) float32,
            activation_step (1,) float32, branch.R and branch.L where there is a branch; bias (N,)
            float32 where calibration has corrected it.
        bias: The checkpoint's, (N,) float32, or None; `tensors` may replace it.
    """

    planes: Tensor
    activation_step: Tensor | None

    def __init__(
        self, layer: LayerPlan, tensors: Mapping[str, NDArray[Any]], bias: Tensor | None
    ) -> None:
        super().__init__()
        self.layer = layer
        planes = pack(tensors["codes"], layer.weight.bits, layer.weight.numbers)
        self.register_buffer("planes", torch.from_numpy(planes))
        self.weight_scale = nn.Parameter(
            torch.from_numpy(tensors["weight_scale"].copy()), requires_grad=False
        )
        if "bias" in tensors:
            bias = torch.from_numpy(tensors["bias"].copy())
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        step = tensors.get("activation_step")
        # For the exported node: reading a parameter while it is traced is not possible.
        self.step = 0.0 if step is None else float(step[0])
        self.attributes = layer.layer_format(self.step).attributes()
        self.attributes |= grid_attributes(layer.weight.grid, layer.activation.grid)
        self.activation_step = (
            None
            if step is None
            else nn.Parameter(torch.from_numpy(step.copy()), requires_grad=False)
        )
        self.branch = None
        if layer.branch is not None:
            self.branch = Monarch(
                torch.from_numpy(tensors["branch.R"].copy()),
                torch.from_numpy(tensors["branch.L"].copy()),
            )
        matrix = fake_quant.hadamard_matrix(layer.rotation_group)
        self.register_buffer("_hadamard", matrix, persistent=False)
        codes = torch.from_numpy(np.ascontiguousarray(tensors["codes"]))
        self.register_buffer("_codes", codes, persistent=False)

    @property
    def codes(self) -> NDArray[np.int8]:
        """The weight codes (N, K), unpacked from the planes."""
        return unpack(self.planes.numpy(), self.layer.in_features, self.layer.weight.numbers)

    def rotate(self, x: Tensor) -> Tensor:
        """Return x H_g, (..., K)."""
        return fake_quant.rotate(x, self.get_buffer("_hadamard"))

    def activation_scale(self, rotated: Tensor) -> Tensor:
        """Return s_x of rotated activations (..., K), as (..., 1)."""
        assert self.activation_step is not None
        step = self.activation_step.to(rotated.dtype)
        return fake_quant.activation_scale(rotated, step, self.layer.activation)

    def quantize(self, rotated: Tensor, scale: Tensor) -> Tensor:
        """Return the codes (..., K) as floating point; gradients pass straight through."""
        activation = self.layer.activation
        assert activation.bits is not None
        scaled = rotated * (1.0 / scale)
        codes = fake_quant.nearest_level(scaled, activation.numbers, activation.bits)
        return fake_quant.pass_through(
            codes, scaled.clamp(*activation.numbers.ends(activation.bits))
        )

    def accumulate(self, codes: Tensor) -> Tensor:
        """Return the exact sums q_x q_w^T per group of input channels.

        Args:
            codes: (..., K), integers held as floating point.

        Returns:
            (..., G, N), integers held as floating point.
        """
        groups = self.weight_scale.shape[1]
        size = self.layer.in_features // groups
        weight_format, activation = self.layer.weight, self.layer.activation
        assert activation.bits is not None
        bound = size * weight_format.numbers.magnitude(weight_format.bits)
        bound *= activation.numbers.magnitude(activation.bits)
        exact = codes.dtype if bound < _EXACT_FLOAT32 else torch.float64
        weight = self.get_buffer("_codes")
        sums = [
            functional.linear(
                codes[..., g * size : (g + 1) * size].to(exact),
                weight[:, g * size : (g + 1) * size].to(exact),
            )
            for g in range(groups)
        ]
        return torch.stack(sums, dim=-2).to(codes.dtype)

    def _linear(self, x: Tensor) -> Tensor:
        rotated = self.rotate(x)
        if self.layer.activation.bits is None:
            n, k = self.layer.out_features, self.layer.in_features
            grouped = self.get_buffer("_codes").reshape(n, self.weight_scale.shape[1], -1)
            weight = (grouped.to(x.dtype) * self.weight_scale[:, :, None]).reshape(n, k)
            y = functional.linear(rotated, weight)
        else:
            scale = self.activation_scale(rotated)
            sums = self.accumulate(self.quantize(rotated, scale))
            y = (sums * self.weight_scale.t()).sum(dim=-2) * scale
        return y if self.bias is None else y + self.bias

    def _symbolic(self, x: Tensor) -> Tensor:
        layer = self.layer
        inputs = [x, self.planes, self.weight_scale]
        if self.bias is not None:
            inputs.append(self.bias)
        return torch.onnx.ops.symbolic(
            "treeq::QLinear",
            inputs,
            attrs=self.attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], layer.out_features),
            version=1,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., N) of x (..., K): the quantized linear plus its branch."""
        y = self._symbolic(x) if torch.compiler.is_exporting() else self._linear(x)
        return y if self.branch is None else y + self.branch(x)
