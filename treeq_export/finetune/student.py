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
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from treeq_export.model.monarch import apply_factors
from treeq_export.model.quantized import layer_tensors, linear_of, quantize_model
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import LayerPlan, Plan, Tensors
from treeq_export.quant.numerics import SCALE_FLOOR, code_range, dequantize_weight
from treeq_export.quant.rotation import hadamard

Kind = Literal["branch", "weight_scale", "activation_step", "bias", "codes"]


class _FakeQuantize(torch.autograd.Function):
    """x_hat = s clip(rint(x / s)); straight through inside the grid, exact for s.

    The gradient of s is that of learned step sizes (Esser et al., LSQ, 2020, eq. 3).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
        scaled = x * (1.0 / scale)
        codes = scaled.round().clamp_(qmin, qmax)
        inside = (scaled >= qmin) & (scaled <= qmax)
        ctx.save_for_backward(scaled, codes, inside)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        scaled, codes, inside = ctx.saved_tensors
        passed = gradient * inside
        slope = (gradient * codes - passed * scaled).sum(dim=-1, keepdim=True)
        return passed, slope, None, None


class TrainableLinear(nn.Module):
    """A quantized linear whose tensors are trained.

    Args:
        layer: Its entry in the plan.
        tensors: The layer's calibrated tensors by short name.
        weight: The full-precision weight W, (N, K).
        bias: The checkpoint's, (N,), or None.
        kinds: What is trained, where the layer has it.
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
        matrix = torch.from_numpy(hadamard(layer.rotation_group).astype(np.float32))
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
            return _round_through(parameter, self.layer.weight.bits)
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

    def _quantize(self, rotated: Tensor) -> Tensor:
        activation = self.layer.activation
        if activation.bits is None:
            return rotated
        step = self.tensor("activation_step")
        if activation.scale == "token_rms":
            scale = torch.sqrt(torch.mean(rotated * rotated, dim=-1, keepdim=True)) * step
        elif activation.scale == "token_absmax":
            scale = rotated.abs().amax(dim=-1, keepdim=True) * step
        else:
            scale = step.expand(*rotated.shape[:-1], 1)
        qmin, qmax = code_range(activation.bits)
        scale = scale.clamp_min(SCALE_FLOOR)
        return cast(Tensor, _FakeQuantize.apply(rotated, scale, qmin, qmax))

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., N) of x (..., K)."""
        group = self.layer.rotation_group
        rotated = x
        if group > 1:
            matrix = self.get_buffer("_hadamard")
            rotated = (x.reshape(*x.shape[:-1], -1, group) @ matrix).reshape(x.shape)
        y = self._multiply(self._quantize(rotated))
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


def _round_through(latent: Tensor, bits: int) -> Tensor:
    """Return clip(rint(latent)); gradients pass straight through.

    Also outside of the grid: a latent that has left it would otherwise never come back.
    """
    codes = torch.round(latent).clamp(*code_range(bits))
    return latent + (codes - latent).detach()


def make_student(
    denoiser: Denoiser, plan: Plan, tensors: Tensors, kinds: frozenset[Kind]
) -> Denoiser:
    """Return a copy of the model with a `TrainableLinear` in place of every planned linear.

    Args:
        denoiser: The full-precision model; what is not replaced is shared with the copy.
        plan: The plan.
        tensors: Its calibrated tensors.
        kinds: What is trained.

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
    return {
        name: module
        for name, module in student.model.named_modules()
        if isinstance(module, TrainableLinear)
    }


def export_student(student: Denoiser) -> Tensors:
    """Return all trained tensors under `<layer>.<tensor>`."""
    return {
        f"{name}.{short}": tensor
        for name, module in trainable_layers(student).items()
        for short, tensor in module.export().items()
    }
