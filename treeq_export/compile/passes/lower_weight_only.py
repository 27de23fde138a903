"""Pass `LowerWeightOnly`: layers whose activation stays in floating point.

Rules:
1. A `treeq::QLinear` with act_bits 0 becomes x H -> MatMul(DequantizeLinear(w)) -> + bias, all in
   float16 for TensorRT and in float32 for ONNX Runtime. With INT4 blocks and no rotation
   TensorRT-RTX 1.7 makes one fused kernel of it; with one scale per channel it keeps a gemm and
   more kernels around it. ONNX Runtime makes MatMulNBits of it.
2. The weight is INT4 up to 4 bits, INT8 above, (K, N), read by nothing but its DequantizeLinear.
3. Scales are (N,) with axis 1, or (K / block, N) with axis 0 and block_size. A scale that float16
   rounds to zero belongs to codes that hardly count and becomes its least number: a zero scale has
   no inverse, and a runtime may refuse it (not tried with TensorRT).
4. In float32, layers with more than 4 bits or other blocks than MatMulNBits has are left to
   LowerQLinear: its 8-bit products take 1.5 to 35 times as long as those of float32 (ONNX Runtime
   1.32, Zen 4), and with blocks that it does not have weights are dequantized at each call.
"""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult

from treeq_export.compile.bodies.qlinear import BodyWriter, write_rotation
from treeq_export.compile.graph.signature import (
    QLINEAR,
    QLinearSignature,
    layer_name,
    nodes_of,
    read_signature,
)
from treeq_export.compile.passes.half_body import half_array
from treeq_export.compile.passes.lower_qlinear import (
    add_initializer,
    initializer_array,
    replace_node,
)
from treeq_export.quant.packing import unpack
from treeq_export.quant.rotation import hadamard

_INT4_BITS = 4
_BLOCK_SIZES = frozenset({16, 32, 64, 128, 256})
_LEAST_HALF = np.float16(2.0**-24)


class LowerWeightOnly(InPlacePass):
    """Lower weight-only layers; in float16, every QLinear left has quantized activations.

    Args:
        half: Whether the body is float16.
    """

    def __init__(self, *, half: bool) -> None:
        super().__init__()
        self._half = half

    def call(self, model: ir.Model) -> PassResult:
        """Change the graph in place."""
        nodes = []
        for node in nodes_of(model, QLINEAR):
            signature = read_signature(node)
            if not signature.act_bits and (self._half or _has_block_product(signature)):
                _lower(model.graph, node, signature, self._half)
                nodes.append(node)
        return PassResult(model, bool(nodes))


def _has_block_product(signature: QLinearSignature) -> bool:
    """Whether ONNX Runtime has a fast MatMulNBits of a layer's weights."""
    blocked = signature.num_groups > 1
    return signature.weight_bits <= _INT4_BITS and (
        not blocked or signature.group_size in _BLOCK_SIZES
    )


def stored_weight(graph: ir.Graph, node: ir.Node, signature: QLinearSignature) -> ir.Value:
    """Return a layer's codes as an initializer (K, N): INT4 up to 4 bits, INT8 above."""
    codes = np.ascontiguousarray(unpack(initializer_array(node.inputs[1]), signature.in_features).T)
    if signature.weight_bits <= _INT4_BITS:
        codes = codes.astype(ml_dtypes.int4)
    return add_initializer(graph, f"{layer_name(node)}.weight_quantized", codes)


def _lower(graph: ir.Graph, node: ir.Node, signature: QLinearSignature, half: bool) -> None:
    name = layer_name(node)

    def shared(key: str, array: NDArray[Any]) -> ir.Value:
        if half:
            return add_initializer(graph, f"{key}/half", array.astype(np.float16))
        return add_initializer(graph, key, array)

    writer = BodyWriter(f"{name}/", shared)
    x = node.inputs[0]
    assert x is not None
    matrix = hadamard(signature.rotation_group).astype(np.float32)
    rotated = write_rotation(writer, x, signature, matrix)
    weight = stored_weight(graph, node, signature)
    scales = np.ascontiguousarray(initializer_array(node.inputs[2]).T)
    if half:
        scales = np.maximum(scales.astype(np.float16), _LEAST_HALF)
    is_blocked = signature.num_groups > 1
    scale = add_initializer(
        graph, f"{name}.weight_quantized_scale", scales if is_blocked else scales[0]
    )
    form: dict[str, Any] = {"axis": 1}
    if is_blocked:
        form = {"axis": 0, "block_size": signature.group_size}
    dequantized = writer.op("DequantizeLinear", weight, scale, **form)
    y = writer.op("MatMul", rotated, dequantized, label="product")
    if signature.has_bias:
        y = writer.op("Add", y, _bias(graph, node, name, half))
    replace_node(graph, node, writer, y)


def _bias(graph: ir.Graph, node: ir.Node, name: str, half: bool) -> ir.Value:
    bias = node.inputs[3]
    assert bias is not None
    if not half:
        return bias
    assert bias.const_value is not None
    return add_initializer(graph, f"{name}.bias/half", half_array(bias.const_value))
