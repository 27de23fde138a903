"""What the PyTorch reference computes for one batch, layer by layer.

The reference is the fake-quantized model of model/qlinear.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from treeq_export.model.qlinear import QLinear
from treeq_export.model.quantized import quantized_layers
from treeq_export.model.zoo import Denoiser
from treeq_export.quant.metrics import sqnr_db

Array = NDArray[Any]

_HALF_MAX = 65504.0


@dataclass(frozen=True)
class Trace:
    """What the reference computed for one batch.

    Attributes:
        inputs: The denoiser's inputs by name.
        output: Its raw output.
        layer_inputs: Input (..., K) by layer name.
        layer_outputs: Output (..., N) by layer name, branch included.
    """

    inputs: dict[str, Tensor]
    output: Array
    layer_inputs: dict[str, Array]
    layer_outputs: dict[str, Array]


def trace_reference(quantized: Denoiser, inputs: dict[str, Tensor]) -> Trace:
    """Run the fake-quantized model and keep every quantized layer's input and output."""
    layer_inputs: dict[str, Array] = {}
    layer_outputs: dict[str, Array] = {}

    def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, received: tuple[Tensor, ...], output: Tensor) -> None:
            layer_inputs[name] = received[0].numpy().copy()
            layer_outputs[name] = output.numpy().copy()

        return hook

    handles = [
        layer.register_forward_hook(observe(name))
        for name, layer in quantized_layers(quantized).items()
    ]
    try:
        with torch.no_grad():
            output = quantized(*inputs.values()).numpy()
    finally:
        for handle in handles:
            handle.remove()
    return Trace(inputs, output, layer_inputs, layer_outputs)


def measure_half_rounding(quantized: Denoiser, trace: Trace) -> float:
    """Return the SQNR in dB of the reference with all module outputs rounded to float16."""

    def round_output(_module: nn.Module, _received: object, output: object) -> object:
        return output.half().float() if isinstance(output, Tensor) else output

    handles = [
        module.register_forward_hook(round_output)
        for module in quantized.modules()
        if isinstance(module, QLinear) or not list(module.children())
    ]
    try:
        with torch.no_grad():
            output = quantized(*trace.inputs.values()).numpy()
    finally:
        for handle in handles:
            handle.remove()
    return sqnr_db(trace.output, output)


def find_half_overflow(quantized: Denoiser, trace: Trace) -> str | None:
    """Return the first module of the reference that reads or writes what float16 cannot hold."""
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def hook(_module: nn.Module, received: tuple[object, ...], output: object) -> None:
            tensors = [x for x in (*received, output) if isinstance(x, Tensor)]
            if any(bool((x.abs() > _HALF_MAX).any()) for x in tensors):
                found.append(name)

        return hook

    handles = [
        module.register_forward_hook(look(name.removeprefix("model.")))
        for name, module in quantized.named_modules()
        if isinstance(module, QLinear) or not list(module.children())
    ]
    try:
        with torch.no_grad():
            quantized(*trace.inputs.values())
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
