"""What the PyTorch reference computes for one batch, layer by layer.

The reference is the fake-quantized model of model/qlinear.py.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from treeq_export.model.qlinear import QLinear
from treeq_export.model.quantized import quantize_model, quantized_layers
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import Plan
from treeq_export.quant.metrics import sqnr_db

Array = NDArray[Any]
Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]

_HALF_MAX = 65504.0


@dataclass(frozen=True)
class Trace:
    """What the reference computed for one batch.

    Attributes:
        inputs: The denoiser's inputs by name.
        output: The network's raw output.
        layer_inputs: Input (..., K) by layer name.
        layer_outputs: Output (..., N) by layer name, branch included.
    """

    inputs: dict[str, Tensor]
    output: Array
    layer_inputs: dict[str, Array]
    layer_outputs: dict[str, Array]


@dataclass(frozen=True)
class Reference:
    """The model that targets are compared with, and what it computed.

    Attributes:
        denoiser: The full-precision model.
        quantized: The fake-quantized model.
        plan: The plan.
        trace: The values that the fake-quantized model computed for one batch.
    """

    denoiser: Denoiser
    quantized: Denoiser
    plan: Plan
    trace: Trace

    @cached_property
    def half_rounding_db(self) -> float:
        """What `measure_half_rounding` gives."""
        return measure_half_rounding(self.quantized, self.trace)

    @cached_property
    def half_overflow(self) -> str | None:
        """What `find_half_overflow` gives where rounding leaves nothing finite; None elsewhere."""
        if math.isfinite(self.half_rounding_db):
            return None
        return find_half_overflow(self.quantized, self.trace)


def make_reference(
    denoiser: Denoiser, plan: Plan, tensors: Mapping[str, Array], batch_size: int, seed: int
) -> Reference:
    """Quantize a model and run it on example inputs.

    Args:
        denoiser: The full-precision model.
        plan: The calibrated plan.
        tensors: The plan's tensors.
        batch_size: Images of the batch.
        seed: Seed of the inputs.
    """
    quantized = quantize_model(denoiser, plan, tensors)
    trace = trace_reference(quantized, denoiser.make_example_inputs(batch_size, seed))
    return Reference(denoiser, quantized, plan, trace)


def trace_reference(quantized: Denoiser, inputs: dict[str, Tensor]) -> Trace:
    """Run the fake-quantized model and keep every quantized layer's input and output."""
    layer_inputs: dict[str, Array] = {}
    layer_outputs: dict[str, Array] = {}

    def observe(name: str) -> Hook:
        def hook(_module: nn.Module, received: tuple[Tensor, ...], output: Tensor) -> None:
            layer_inputs[name] = received[0].numpy().copy()
            layer_outputs[name] = output.numpy().copy()

        return hook

    with _hooked((layer, observe(name)) for name, layer in quantized_layers(quantized).items()):
        output = _run(quantized, inputs)
    return Trace(inputs, output, layer_inputs, layer_outputs)


def measure_half_rounding(quantized: Denoiser, trace: Trace) -> float:
    """Return the SQNR in dB of the reference with all module outputs rounded to float16."""

    def round_output(_module: nn.Module, _received: object, output: object) -> object:
        return output.half().float() if isinstance(output, Tensor) else output

    with _hooked((module, round_output) for _, module in _modules(quantized)):
        return sqnr_db(trace.output, _run(quantized, trace.inputs))


def find_half_overflow(quantized: Denoiser, trace: Trace) -> str | None:
    """Return the first module of the reference that reads or writes what float16 cannot hold."""
    found: list[str] = []

    def look(name: str) -> Hook:
        def hook(_module: nn.Module, received: tuple[object, ...], output: object) -> None:
            tensors = [x for x in (*received, output) if isinstance(x, Tensor)]
            if any(bool((x.abs() > _HALF_MAX).any()) for x in tensors):
                found.append(name)

        return hook

    with _hooked((module, look(name)) for name, module in _modules(quantized)):
        _run(quantized, trace.inputs)
    return found[0] if found else None


@contextmanager
def _hooked(hooks: Iterator[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Call a hook after each of some modules."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _modules(quantized: Denoiser) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that compute something themselves, with the names of the checkpoint."""
    for name, module in quantized.named_modules():
        if isinstance(module, QLinear) or not list(module.children()):
            yield name.removeprefix("model."), module


def _run(quantized: Denoiser, inputs: Mapping[str, Tensor]) -> Array:
    with torch.no_grad():
        return quantized(*inputs.values()).numpy()
