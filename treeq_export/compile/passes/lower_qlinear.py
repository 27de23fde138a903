"""Pass `LowerQLinear`: `treeq::QLinear` to standard ONNX with INT4, INT8 or UINT8 weights.

Rules:
1. The planes become `<layer>.weight_quantized`, transposed to (K, N): INT4 where all levels fit,
   followed by a Cast to INT8 that a runtime folds at load; else INT8, or UINT8 with the zero point
   128 where INT8 products could saturate (`zero_points`).
2. The scales become `<layer>.weight_quantized_scale`, (N,), or (G, 1, N) with several per channel.
3. The node becomes the form of bodies/qlinear.py; the output keeps its name, type and shape.
"""

from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes import PassResult

from treeq_export.compile.bodies.layer import LoweredLayer
from treeq_export.compile.graph.contract import RewritePass
from treeq_export.compile.graph.signature import DOMAIN, QLINEAR, nodes_of


class LowerQLinear(RewritePass[ir.Node]):
    """Rewrite every `treeq::QLinear` of the graph; none is left."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the graph in place."""
        result = super().call(model)
        if result.modified and not any(node.domain == DOMAIN for node in model.graph):
            model.graph.opset_imports.pop(DOMAIN, None)
        return result

    def _find(self, model: ir.Model) -> Iterator[ir.Node]:
        yield from nodes_of(model, QLINEAR)

    def _rewrite(self, model: ir.Model, found: ir.Node) -> None:
        layer = LoweredLayer(model.graph, found)
        signature, codes, scales = layer.signature, layer.codes, layer.scales[0]
        if signature.num_groups > 1:
            codes = codes.reshape(signature.num_groups, signature.group_size, -1)
            scales = layer.scales[:, None, :]
        weight = layer.store_codes(codes)
        if signature.fits_int4:
            weight = layer.writer.op("Cast", weight, to=ir.DataType.INT8.value)
        layer.body.write(layer.x, weight, layer.store_scales(scales), layer.bias)
        layer.finish()
