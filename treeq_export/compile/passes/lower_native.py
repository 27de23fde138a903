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

from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from treeq_export.compile.bodies.qlinear import (
    SIGNED,
    BodyWriter,
    write_channel_product,
    write_codes,
    write_rotation,
    write_scale,
)
from treeq_export.compile.graph.signature import (
    QLINEAR,
    QLinearSignature,
    layer_name,
    nodes_of,
    read_signature,
)
from treeq_export.compile.passes.lower_qlinear import (
    add_initializer,
    initializer_array,
    replace_node,
)
from treeq_export.compile.passes.lower_weight_only import stored_weight
from treeq_export.quant.rotation import hadamard

FLOAT, HALF = ir.DataType.FLOAT.value, ir.DataType.FLOAT16.value


class Quantized(NamedTuple):
    """A layer's activation codes (..., K) and their scale (..., 1), or (1,)."""

    codes: ir.Value
    scale: ir.Value


class LowerNative(InPlacePass):
    """Lower quantized layers; ensures that no QLinear is left."""

    def call(self, model: ir.Model) -> PassResult:
        """Change the graph in place."""
        nodes = nodes_of(model, QLINEAR)
        shared: dict[tuple[object, ...], Quantized] = {}
        for node in nodes:
            _lower(model.graph, node, shared)
        return PassResult(model, bool(nodes))


def _lower(graph: ir.Graph, node: ir.Node, shared: dict[tuple[object, ...], Quantized]) -> None:
    signature, name = read_signature(node), layer_name(node)
    writer = BodyWriter(f"{name}/", lambda key, array: add_initializer(graph, key, array))
    x = node.inputs[0]
    assert x is not None
    key = (x, *signature.codes_key)
    if key not in shared:
        shared[key] = _quantize(writer, x, signature)
    codes, scale = shared[key]
    scales = np.ascontiguousarray(initializer_array(node.inputs[2])[:, 0])
    product = write_channel_product(
        writer,
        codes,
        stored_weight(graph, node, signature),
        add_initializer(graph, f"{name}.weight_quantized_scale", scales),
        SIGNED,
    )
    y = writer.op("Mul", product, scale)
    if signature.has_bias:
        bias = node.inputs[3]
        assert bias is not None
        y = writer.op("Add", y, bias)
    replace_node(graph, node, writer, writer.op("Cast", y, to=HALF))


def _quantize(writer: BodyWriter, x: ir.Value, signature: QLinearSignature) -> Quantized:
    wide = writer.op("Cast", x, to=FLOAT)
    matrix = hadamard(signature.rotation_group).astype(np.float32)
    rotated = write_rotation(writer, wide, signature, matrix)
    scale = write_scale(writer, rotated, signature)
    return Quantized(write_codes(writer, rotated, scale, signature, SIGNED), scale)
