"""Putting a calibrated plan into a model: each planned linear becomes a `QLinear`."""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from numpy.typing import NDArray
from torch import nn

from treeq_export.errors import PlanError
from treeq_export.model.qlinear import QLinear
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import LayerPlan, Plan

Module = TypeVar("Module", bound=nn.Module)


def layer_tensors(tensors: Mapping[str, NDArray[Any]], name: str) -> dict[str, NDArray[Any]]:
    """Return one layer's tensors by short name (codes, weight_scale, branch.R, ...)."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}


def linear_of(denoiser: Denoiser, layer: LayerPlan) -> nn.Linear:
    """Return the floating-point linear that a plan's entry names.

    Raises:
        PlanError: The model has no such linear, or its shape differs.
    """
    try:
        module = denoiser.model.get_submodule(layer.name)
    except AttributeError as error:
        raise PlanError(f"{layer.name}: the model has no such layer. Search again.") from error
    if not isinstance(module, nn.Linear):
        raise PlanError(f"{layer.name}: is a {type(module).__name__}, expected Linear.")
    received = (module.out_features, module.in_features)
    expected = (layer.out_features, layer.in_features)
    if received != expected:
        raise PlanError(f"{layer.name}: shape {received}, the plan says {expected}. Search again.")
    return module


def quantize_model(denoiser: Denoiser, plan: Plan, tensors: Mapping[str, NDArray[Any]]) -> Denoiser:
    """Return a copy of the model whose planned linears are `QLinear`.

    Args:
        denoiser: The full-precision model; it is left as it is. All tensors that are not replaced
            are shared with the copy.
        plan: The plan.
        tensors: Tensors of the plan (`plan.load_tensors`).

    Returns:
        The fake-quantized model, in eval mode.

    Raises:
        PlanError: The plan does not fit the model.
    """
    shared = {id(tensor): tensor for tensor in (*denoiser.parameters(), *denoiser.buffers())}
    quantized = copy.deepcopy(denoiser, shared)
    for layer in plan.layers:
        replace_linear(quantized, layer, layer_tensors(tensors, layer.name))
    return quantized.eval()


def replace_linear(
    denoiser: Denoiser, layer: LayerPlan, tensors: Mapping[str, NDArray[Any]]
) -> QLinear:
    """Put a `QLinear` in the place of one linear, and return it.

    Args:
        denoiser: The model; it is changed.
        layer: The layer's entry in the plan.
        tensors: Tensors of the layer by short name.

    Raises:
        PlanError: The model has no such linear.
    """
    replacement = QLinear(layer, tensors, linear_of(denoiser, layer).bias)
    put_module(denoiser, layer.name, replacement)
    return replacement


def put_module(denoiser: Denoiser, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one that has this name."""
    parent_name, _, child = name.rpartition(".")
    parent = denoiser.model.get_submodule(parent_name)
    if isinstance(parent, nn.ModuleList | nn.Sequential):
        parent[int(child)] = module
    else:
        setattr(parent, child, module)


def quantized_layers(denoiser: Denoiser) -> dict[str, QLinear]:
    """Return the `QLinear` modules by layer name, in module order."""
    return modules_of(denoiser, QLinear)


def modules_of(denoiser: Denoiser, kind: type[Module]) -> dict[str, Module]:
    """Return the modules of a class by name, in module order."""
    found = denoiser.model.named_modules()
    return {name: module for name, module in found if isinstance(module, kind)}
