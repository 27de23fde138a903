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

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from treeq_export.compile.bodies.layer import LoweredLayer
from treeq_export.compile.graph.contract import RewritePass, refuse
from treeq_export.compile.graph.signature import (
    QLINEAR,
    QLinearSignature,
    nodes_of,
    read_signature,
)
from treeq_export.compile.graph.value_types import FLOAT, half_array

_BLOCK_SIZES = frozenset({16, 32, 64, 128, 256})
_LEAST_HALF = np.float16(2.0**-24)


class LowerWeightOnly(RewritePass[ir.Node]):
    """Lower weight-only layers; in float16, every QLinear left has quantized activations.

    Args:
        half: Whether the body is float16.
    """

    def __init__(self, *, half: bool) -> None:
        super().__init__()
        self._half = half

    def requires(self, model: ir.Model) -> None:
        """Check that the body is float16 already, if it is to be."""
        layers = nodes_of(model, QLINEAR) if self._half else []
        wide = (node for node in layers if node.inputs[0] and node.inputs[0].dtype == FLOAT)
        refuse(wide, "reads float32 in a float16 body.")

    def _find(self, model: ir.Model) -> Iterator[ir.Node]:
        for node in nodes_of(model, QLINEAR):
            signature = read_signature(node)
            if not signature.act_bits and (self._half or _has_block_product(signature)):
                yield node

    def _rewrite(self, model: ir.Model, found: ir.Node) -> None:
        layer = LoweredLayer(model.graph, found, half=self._half)
        writer, signature, scales = layer.writer, layer.signature, layer.scales
        rotated = layer.body.rotate(layer.x)
        weight = layer.store_codes(layer.codes)
        if self._half:
            scales = np.maximum(scales.astype(np.float16), _LEAST_HALF)
        form: dict[str, Any] = {"axis": 1}
        if signature.num_groups > 1:
            form = {"axis": 0, "block_size": signature.group_size}
        else:
            scales = scales[0]
        scale = layer.store_scales(scales)
        dequantized = writer.op("DequantizeLinear", weight, scale, **form)
        y = writer.op("MatMul", rotated, dequantized, label="product")
        bias = layer.bias
        if bias is not None:
            if self._half and bias.const_value is not None:
                bias = layer.store("bias/half", half_array(bias.const_value))
            writer.op("Add", y, bias)
        layer.finish()


def _has_block_product(signature: QLinearSignature) -> bool:
    """Whether ONNX Runtime has a fast MatMulNBits of a layer's weights."""
    blocked = signature.num_groups > 1
    return signature.fits_int4 and (not blocked or signature.group_size in _BLOCK_SIZES)
