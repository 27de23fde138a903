"""The ways to run a compiled graph in ONNX Runtime on this machine.

A graph of packed layers runs in two ways: with our custom-op library, and without it, where ONNX
Runtime takes the function bodies. A graph that is made for TensorRT is emulated: ONNX Runtime runs
its Q/DQ nodes and function bodies, which shows what the graph says, not what an engine does.
"""

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from treeq_export.runners.cpu_kernels import ORT_LIBRARY, find_library
from treeq_export.runners.graph_meta import LayerSite
from treeq_export.runners.kernel_probe import KernelProbe
from treeq_export.runners.layer_probe import LayerProbe
from treeq_export.runners.model_files import model_files
from treeq_export.runners.ort_runner import OrtRunner
from treeq_export.runners.products import products_saturate

_FOLD_BELOW_BYTES = 100_000_000


@dataclass(frozen=True)
class Way:
    """One way to run the graph of a target.

    Attributes:
        name: The way's name in records and options, such as "ort_body".
        target: The target whose graph is run.
        kernels: Whether our custom-op library runs the `treeq` ops where it is installed.
        packed: Whether weights are bit planes, which ONNX Runtime unpacks without our kernels.
        int8_products: Whether 8-bit products are INT8 by INT8, as TensorRT wants them. Where ONNX
            Runtime would saturate them, it is told not to turn activations into UINT8.
        half: Whether the graph holds activations in float16.
        emulated: Whether ONNX Runtime only stands in for the runtime that the graph is made for,
            so that its speed says nothing.
    """

    name: str
    target: str
    kernels: bool = False
    packed: bool = False
    int8_products: bool = False
    half: bool = False
    emulated: bool = False

    @property
    def uses_kernels(self) -> bool:
        """Whether our kernels run the `treeq` ops on this machine."""
        return self.kernels and find_library(ORT_LIBRARY) is not None

    @property
    def _keep_int8(self) -> bool:
        return self.int8_products and products_saturate()

    def options(self, model: Path | bytes) -> dict[str, bool]:
        """Return the options of OrtRunner.

        Constants are folded but in a packed model of more than 100 MB without our kernels.

        Args:
            model: Path of the graph, or its serialized bytes.
        """
        return {
            "use_kernels": self.uses_kernels,
            "fold_constants": self.uses_kernels
            or not self.packed
            or _size_of(model) < _FOLD_BELOW_BYTES,
            "keep_int8": self._keep_int8,
        }

    def open(
        self, model: Path | bytes, *, threads: int | None = None, spin: bool = False
    ) -> OrtRunner:
        """Return the runner of the target's graph, or of one that was made from it.

        Args:
            model: Path of the graph, or its serialized bytes.
            threads: Threads inside an operator; None lets ONNX Runtime choose.
            spin: Whether threads that wait for work keep their cores.
        """
        return OrtRunner(model, threads=threads, spin=spin, **self.options(model))

    def probe(self, model: ir.Model, site: LayerSite) -> KernelProbe | LayerProbe:
        """Return what runs one layer of the graph alone.

        Args:
            model: The graph.
            site: The layer's place in it.

        Raises:
            RunnerError: The graph has no such layer.
        """
        if self.uses_kernels:
            return KernelProbe(model, site)
        return LayerProbe(model, site, keep_int8=self._keep_int8)


def _size_of(model: Path | bytes) -> int:
    if isinstance(model, bytes):
        return len(model)
    return sum(file.stat().st_size for file in model_files(model))
