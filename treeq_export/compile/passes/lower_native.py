"""Pass `LowerNative`: `treeq::QLinear` as Q/DQ nodes that TensorRT runs on its Int8 tensor cores.

Rules:
1. A layer becomes Cast to float32 -> x' = x H -> Clip(x' * (1/s)) -> QuantizeLinear, scale 1, INT8
   -> DequantizeLinear -> MatMul(DequantizeLinear(w)) -> * s -> + bias -> Cast to float16.
   Everything between the two Casts is float32: with float16 scales TensorRT stores the int32 sum
   unscaled in float16, which overflows.
2. The weight is INT4 up to 4 bits, INT8 above, (K, N) with one float32 scale per output channel. It
   goes straight into its DequantizeLinear: TensorRT refuses an INT4 constant that feeds anything
   else.
3. Layers that read one value in one activation format (q, k and v) share Cast, rotation, scale and
   codes.

Weight-only layers are lowered before (LowerWeightOnly).

TensorRT takes INT8 with the zero point 0 only. ONNX Runtime, which emulates the target, multiplies
that with saturation on x86 without VNNI if weights have 8 bits; targets keep it from
that by a session option.
"""

from collections.abc import Iterator
from typing import NamedTuple

import onnx_ir as ir

from treeq_export.compile.bodies.layer import LoweredLayer
from treeq_export.compile.bodies.storage import SIGNED
from treeq_export.compile.graph.contract import RewritePass, refuse
from treeq_export.compile.graph.signature import QLINEAR, nodes_of, read_signature
from treeq_export.compile.graph.value_types import FLOAT, HALF


class Quantized(NamedTuple):
    """A layer's activation codes (..., K) and their scale (..., 1), or (1,)."""

    codes: ir.Value
    scale: ir.Value


Shared = dict[tuple[object, ...], Quantized]


class LowerNative(RewritePass[tuple[ir.Node, Shared]]):
    """Lower quantized layers; no QLinear is left."""

    def requires(self, model: ir.Model) -> None:
        """Check that each layer left has codes of its activation and one scale per channel."""
        signatures = {node: read_signature(node) for node in nodes_of(model, QLINEAR)}
        others = (n for n, s in signatures.items() if s.num_groups > 1 or not s.act_bits)
        refuse(others, "has no Int8 product in TensorRT.")

    def _find(self, model: ir.Model) -> Iterator[tuple[ir.Node, Shared]]:
        shared: Shared = {}
        for node in nodes_of(model, QLINEAR):
            yield node, shared

    def _rewrite(self, model: ir.Model, found: tuple[ir.Node, Shared]) -> None:
        node, shared = found
        layer = LoweredLayer(model.graph, node, SIGNED)
        writer, key = layer.writer, (layer.x, *layer.signature.codes_key)
        if key not in shared:
            rotated = layer.body.rotate(writer.op("Cast", layer.x, to=FLOAT.value))
            scale = layer.body.scale(rotated)
            shared[key] = Quantized(layer.body.codes(rotated, scale), scale)
        codes, scale = shared[key]
        weight = layer.store_codes(layer.codes)
        product = layer.body.channel_product(codes, weight, layer.store_scales(layer.scales[0]))
        y = writer.op("Mul", product, scale)
        if layer.bias is not None:
            y = writer.op("Add", y, layer.bias)
        writer.op("Cast", y, to=HALF.value)
        layer.finish()
