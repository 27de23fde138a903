"""Every layer of the Triton kernels against the CPU reference, as validate does it for graphs.

Own errors are measured on float32 inputs, so that nothing but the kernels' own arithmetic is in
them, and the recipe's limits hold; propagated errors in the runner's type.
"""

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from treeq_export.model.quantized import linear_of, quantized_layers
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import Plan
from treeq_export.quant.metrics import max_abs_error, sqnr_db
from treeq_export.recipe import ParityGates
from treeq_export.records import LayerParity, TargetParity
from treeq_export.runners.cuda_runner import CudaRunner, GpuProbe
from treeq_export.runners.gpu_layers import GpuQLinear
from treeq_export.runners.graph_meta import LayerSite
from treeq_export.validate import Trace, compare_layer, make_gates

CUDA = "cuda"


class PlainProbe:
    """A weight-only layer, which runs as a plain linear in the runner's type."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.site = LayerSite(name, "", "")
        self._module = module

    def run_output(self, x: NDArray[np.float32]) -> tuple[NDArray[Any], None]:
        """Return y (..., N) float32, and None for the codes."""
        first = next(self._module.parameters())
        with torch.no_grad():
            y = self._module(torch.from_numpy(x).to(first.device, first.dtype))
        return y.float().cpu().numpy(), None

    def run_accumulators(self, _x: NDArray[np.float32]) -> None:
        """Return None: there are no integer sums."""


def compare_cuda(
    runner: CudaRunner, denoiser: Denoiser, quantized: Denoiser, plan: Plan, trace: Trace
) -> Iterator[LayerParity]:
    """Yield the comparison of every layer in the Triton kernels, in execution order.

    Args:
        runner: Entered.
        denoiser: The full-precision model.
        quantized: The reference.
        plan: The plan.
        trace: What the reference computed.
    """
    _, inside = runner.run_with_layers(trace.inputs)
    with CudaRunner(
        quantized, dtype="float32", device=str(runner.device), use_graphs=False
    ) as exact:
        references = quantized_layers(quantized)
        for layer in plan.layers:
            name = layer.name
            module = exact.model.model.get_submodule(name)
            probe = GpuProbe(module) if isinstance(module, GpuQLinear) else PlainProbe(name, module)
            full = linear_of(denoiser, layer)
            # It has what compare_layer calls.
            yield compare_layer(cast(Any, probe), references[name], full, trace, inside[name])


def validate_cuda(
    runner: CudaRunner,
    denoiser: Denoiser,
    quantized: Denoiser,
    plan: Plan,
    trace: Trace,
    limits: ParityGates,
) -> TargetParity:
    """Compare the Triton kernels with the reference: the same record as of a compiled target."""
    output = runner.run(trace.inputs)
    layers = list(compare_cuda(runner, denoiser, quantized, plan, trace))
    sqnr = sqnr_db(trace.output, output)
    gates = make_gates(CUDA, sqnr, layers, limits)
    return TargetParity(
        target=CUDA,
        runtime=f"Triton kernels in PyTorch, {runner.device.type}, {runner.dtype}",
        passed=all(gate.passed for gate in gates),
        sqnr_db=sqnr,
        max_abs_error=max_abs_error(trace.output, output),
        layers=layers,
        gates=gates,
    )
