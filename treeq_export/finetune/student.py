"""The student: the quantized model with parameters that can be trained.

Every planned linear becomes a `TrainableLinear`. It computes what `QLinear` computes, with the
weight dequantized first and in float32 throughout, which is faster and equal up to rounding.

What is trained is dimensionless, so that one learning rate serves layers of any size:

    branch.R, branch.L, bias        unit * p       unit: the tensor's own rms, the weight's row norm
    weight_scale, activation_step   start * exp(p)               stays positive, p starts at zero
    codes (QAT)                     clip(rint(p))                p in units of the weight's step

QAT's weights start in the middle of the calibrated codes' cells. Starting where W' itself lies, as
near as the cell allows, undoes GPTQ: where it rounded away from the nearest code, W' lies at the
border, and the first noisy steps round it back (digits, W3A3, 200 steps: Frechet distance 1.47
times full precision's, against 1.45 without any training).
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from treeq_export.model import fake_quant
from treeq_export.model.monarch import apply_factors
from treeq_export.model.quantized import layer_tensors, linear_of, modules_of, quantize_model
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import LayerPlan, Plan, Tensors
from treeq_export.quant.numerics import dequantize_weight

Kind = Literal["branch", "weight_scale", "activation_step", "bias", "codes"]


class TrainableLinear(nn.Module):
    """A quantized linear whose tensors are trained.

    Args:
        layer: The layer's entry in the plan.
        tensors: The layer's calibrated tensors by short name.
        weight: The full-precision weight W, (N, K).
        bias: The checkpoint's, (N,), or None.
        kinds: Kinds of tensors that are trained, where the layer has them.
    """

    def __init__(
        self,
        layer: LayerPlan,
        tensors: Mapping[str, NDArray[Any]],
        weight: NDArray[np.floating],
        bias: Tensor | None,
        kinds: frozenset[Kind],
    ) -> None:
        super().__init__()
        self.layer = layer
        self.start = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
        if "bias" not in tensors and (bias is not None or "bias" in kinds):
            self.start["bias"] = torch.zeros(layer.out_features) if bias is None else bias.detach()
        self.unit = {
            name: self.start[name].square().mean().sqrt().item() or 1.0
            for name in ("branch.R", "branch.L")
            if name in self.start
        }
        self.unit["bias"] = float(np.linalg.norm(weight) / np.sqrt(len(weight))) or 1.0
        self.trained = nn.ParameterDict()
        for name in self._names(kinds):
            self.trained[name.replace(".", "_")] = nn.Parameter(self._initial(name))
        matrix = fake_quant.hadamard_matrix(layer.rotation_group)
        self.register_buffer("_hadamard", matrix, persistent=False)
        fixed = None  # the weight, or the codes where only their scale is trained
        if "codes" not in self.trained:
            fixed = self.start["codes"].to(torch.float32)
            if "weight_scale" not in self.trained:
                fixed = torch.from_numpy(
                    dequantize_weight(tensors["codes"], tensors["weight_scale"])
                )
        self.register_buffer("_fixed", fixed, persistent=False)

    def _names(self, kinds: frozenset[Kind]) -> list[str]:
        """Return the tensors of these kinds that the layer has."""
        names = [kind for kind in ("weight_scale", "bias", "codes") if kind in kinds]
        if "activation_step" in kinds and _has_trainable_step(self.layer):
            names.append("activation_step")
        if "branch" in kinds and self.layer.branch is not None:
            names += ["branch.R", "branch.L"]
        return names

    def _initial(self, name: str) -> Tensor:
        start = self.start[name]
        if name in self.unit:
            return start / self.unit[name]
        return start.to(torch.float32) if name == "codes" else torch.zeros_like(start)

    def tensor(self, name: str) -> Tensor:
        """Return the current value of a tensor, differentiable where it is trained."""
        key = name.replace(".", "_")
        if key not in self.trained:
            return self.start[name]
        parameter = self.trained[key]
        if name in self.unit:
            return parameter * self.unit[name]
        if name == "codes":
            # Straight through outside of the grid too: a value that has left it could otherwise
            # never come back.
            weight = self.layer.weight
            codes = fake_quant.nearest_level(parameter, weight.numbers, weight.bits)
            return fake_quant.pass_through(codes, parameter)
        return self.start[name] * torch.exp(parameter)

    def _multiply(self, x_hat: Tensor) -> Tensor:
        """Return x_hat W'^T; codes that are not trained need no gradient of their size."""
        if "codes" not in self.trained and "weight_scale" not in self.trained:
            return functional.linear(x_hat, self.get_buffer("_fixed"))
        codes = self.tensor("codes") if "codes" in self.trained else self.get_buffer("_fixed")
        scale = self.tensor("weight_scale")
        if scale.shape[1] == 1:
            return functional.linear(x_hat, codes) * scale[:, 0]
        weight = codes.reshape(*scale.shape, -1) * scale[:, :, None]
        return functional.linear(x_hat, weight.reshape(codes.shape))

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., N) of x (..., K)."""
        activation, x_hat = (
            self.layer.activation,
            fake_quant.rotate(x, self.get_buffer("_hadamard")),
        )
        if activation.bits is not None:
            x_hat = fake_quant.fake_quantize(x_hat, self.tensor("activation_step"), activation)
        y = self._multiply(x_hat)
        if "bias" in self.start:
            y = y + self.tensor("bias")
        if self.layer.branch is not None:
            y = y + apply_factors(x, self.tensor("branch.R"), self.tensor("branch.L"))
        return y

    @torch.no_grad()
    def export(self) -> Tensors:
        """Return the trained tensors by short name, as the plan's file holds them."""
        names = [name for name in self.start if name.replace(".", "_") in self.trained]
        exported = {name: self.tensor(name) for name in names}
        return {
            name: tensor.to(torch.int8 if name == "codes" else torch.float32).numpy()
            for name, tensor in exported.items()
        }


def _has_trainable_step(layer: LayerPlan) -> bool:
    bits, scale = layer.activation.bits, layer.activation.scale
    return bits is not None and scale.has_trainable_step(bits)


def make_student(
    denoiser: Denoiser, plan: Plan, tensors: Tensors, kinds: frozenset[Kind]
) -> Denoiser:
    """Return a copy of the model with a `TrainableLinear` in place of every planned linear.

    Args:
        denoiser: The full-precision model; what is not replaced is shared with the copy.
        plan: The plan.
        tensors: The calibrated tensors.
        kinds: Kinds of tensors that are trained.

    Raises:
        PlanError: The plan does not fit the model.
    """
    student = quantize_model(denoiser, plan, tensors)
    for layer in plan.layers:
        linear = linear_of(denoiser, layer)
        module = TrainableLinear(
            layer,
            layer_tensors(tensors, layer.name),
            linear.weight.detach().numpy(),
            linear.bias,
            kinds,
        )
        student.model.set_submodule(layer.name, module)
    return student


def trainable_layers(student: Denoiser) -> dict[str, TrainableLinear]:
    """Return the `TrainableLinear` modules by layer name, in module order."""
    return modules_of(student, TrainableLinear)


def export_student(student: Denoiser) -> Tensors:
    """Return all trained tensors under `<layer>.<tensor>`."""
    return {
        f"{name}.{short}": tensor
        for name, module in trainable_layers(student).items()
        for short, tensor in module.export().items()
    }
