"""A `treeq::QLinear` node on its way to standard operators, with its tensors as arrays."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from treeq_export.compile.bodies.qlinear import QLinearBody
from treeq_export.compile.bodies.storage import ZeroPoints
from treeq_export.compile.bodies.writer import BodyWriter
from treeq_export.compile.graph.rewrite import add_initializer, initializer_array, replace_node
from treeq_export.compile.graph.signature import layer_name, read_signature
from treeq_export.quant.packing import unpack
from treeq_export.runners.plain_layer import input_of


class LoweredLayer:
    """A layer, and the nodes that take its place.

    Args:
        graph: Holds the node.
        node: A `treeq::QLinear`.
        zeros: Storage of the codes; None is what `zero_points` says.
        half: Whether shared constants are float16.

    Attributes:
        signature: Formats and sizes.
        writer: Records the nodes; they and their values bear the layer's name.
        body: Writes the layer's arithmetic.
        x: The layer's input, (..., K).
        codes: Weight codes (K, N), int8.
        scales: Weight scales (G, N), float32.
        bias: (N,), or None.
    """

    def __init__(
        self,
        graph: ir.Graph,
        node: ir.Node,
        zeros: ZeroPoints | None = None,
        *,
        half: bool = False,
    ) -> None:
        x = node.inputs[0]
        assert x is not None
        self._graph, self._node, self._half = graph, node, half
        self._name = layer_name(node)
        self.signature = read_signature(node)
        self.writer = BodyWriter(f"{self._name}/", self._share)
        self.body = QLinearBody(self.writer, self.signature, zeros)
        self.x = x
        planes, grid = initializer_array(node.inputs[1]), self.signature.weight_grid
        self.codes = np.ascontiguousarray(unpack(planes, self.signature.in_features, grid).T)
        self.scales = np.ascontiguousarray(initializer_array(node.inputs[2]).T)
        self.bias = input_of(node, "bias")

    def _share(self, name: str, array: NDArray[Any]) -> ir.Value:
        if self._half:
            return add_initializer(self._graph, f"{name}/half", array.astype(np.float16))
        return add_initializer(self._graph, name, array)

    def store(self, suffix: str, array: NDArray[Any]) -> ir.Value:
        """Return a new initializer of the layer."""
        return add_initializer(self._graph, f"{self._name}.{suffix}", array)

    def store_codes(self, codes: NDArray[np.int8]) -> ir.Value:
        """Return weight codes as an initializer: INT4 where all fit, else INT8 or UINT8."""
        if self.signature.fits_int4:
            return self.store("weight_quantized", codes.astype(ml_dtypes.int4))
        zero = self.body.zeros.weight
        stored = (codes.astype(np.int16) + zero).astype(zero.dtype)
        return self.store("weight_quantized", stored)

    def store_scales(self, scales: NDArray[Any]) -> ir.Value:
        """Return weight scales as an initializer."""
        return self.store("weight_quantized_scale", scales)

    def finish(self) -> None:
        """Put the recorded nodes in the layer's place; the last one computes its output."""
        replace_node(self._graph, self._node.outputs[0], self.writer.tape.nodes)
