"""Every layer of the Triton kernels against the CPU reference, as validate does it for graphs.

Own errors are measured on float32 inputs, so that nothing but the kernels' own arithmetic is in
them, and the recipe's limits hold; propagated errors in the runner's type.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from treeq_export.records import LayerParity
from treeq_export.runners.cuda_runner import CudaRunner, GpuProbe
from treeq_export.runners.gpu_layers import GpuQLinear
from treeq_export.runners.protocols import Probe
from treeq_export.runners.reference_trace import Reference
from treeq_export.validate.compare import compare_layers

CUDA = "cuda"


class PlainProbe:
    """A weight-only layer, which runs as a plain linear in the runner's type."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self._module = module

    def run_output(self, x: NDArray[np.float32]) -> tuple[NDArray[Any], None]:
        """Return y (..., N) float32, and None for the codes."""
        first = next(self._module.parameters())
        with torch.no_grad():
            y = self._module(torch.from_numpy(x).to(first.device, first.dtype))
        return y.float().cpu().numpy(), None

    def run_accumulators(self, x: NDArray[np.float32]) -> None:
        """Return None: there are no integer sums."""


def compare_cuda(runner: CudaRunner, reference: Reference) -> Iterator[LayerParity]:
    """Yield the comparison of every layer in the Triton kernels, in execution order.

    Args:
        runner: The entered runner.
        reference: The reference.
    """
    _, inside = runner.run_with_layers(reference.trace.inputs)
    with CudaRunner(
        reference.quantized, dtype="float32", device=str(runner.device), use_graphs=False
    ) as exact:

        def probe(name: str) -> Probe:
            module = exact.model.model.get_submodule(name)
            return GpuProbe(module) if isinstance(module, GpuQLinear) else PlainProbe(name, module)

        probes = (probe(layer.name) for layer in reference.plan.layers)
        yield from compare_layers(reference, probes, inside)
