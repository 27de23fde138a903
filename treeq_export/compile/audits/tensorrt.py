"""The audit of TensorRT's targets: what is each quantized layer in the compiled file?

TensorRT is not needed for it; whether an engine obeys the file is for the verifier of the build
stage. Each layer is found by its weight, as stored: the bit planes of a plugin node, or the INT4 or
INT8 constant of a DequantizeLinear.

    QLinear plugin        `treeq::QLinear` with the plugin's namespace and version
    int8 Q/DQ gemm        MatMul of a dequantized INT8 activation and the dequantized weight
    weight-only           MatMul of a floating-point activation and the dequantized weight
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from treeq_export.compile.audits.entry import audit_entry, digest_of
from treeq_export.compile.audits.onnx_runtime import Audit
from treeq_export.compile.graph.match import producer_of
from treeq_export.compile.graph.signature import QLINEAR, nodes_of
from treeq_export.compile.passes.mark_plugins import is_marked
from treeq_export.errors import CompileError
from treeq_export.plan import LayerPlan, Plan
from treeq_export.quant.packing import pack
from treeq_export.records import AuditLayer
from treeq_export.runners.graph_file import read_graph

PLUGIN, INT8_GEMM, WEIGHT_ONLY = "QLinear plugin", "int8 Q/DQ gemm", "weight-only"
FUNCTION_BODY, FLOAT_GEMM = "QLinear without plugin attributes", "float gemm"
_INTEGER = frozenset({PLUGIN, INT8_GEMM})


def audit_tensorrt(path: Path, plan: Plan, tensors: Mapping[str, NDArray[Any]]) -> list[AuditLayer]:
    """Say what every quantized layer is in a compiled file.

    Args:
        path: The compiled model.
        plan: The plan.
        tensors: The plan's tensors, for the codes.

    Returns:
        One entry per layer, in execution order.
    """
    model = read_graph(path, error=CompileError, remedy="Run `treeq-export compile` again.")
    found: dict[str, list[str]] = {}
    for digest, kind in _read_kinds(model):
        found.setdefault(digest, []).append(kind)
    return [
        audit_entry(layer, _forms(layer, tensors[f"{layer.name}.codes"]), found, _INTEGER)
        for layer in plan.layers
    ]


def _forms(layer: LayerPlan, codes: NDArray[np.int8]) -> Iterator[NDArray[Any]]:
    """Yield how a file may store a layer's weight."""
    yield codes.T
    yield pack(codes, layer.weight.bits, layer.weight.numbers)


AUDIT_FILE = Audit(audit_tensorrt, "in the compiled file", "Exclude them by search.exclude.")


def _read_kinds(model: ir.Model) -> Iterator[tuple[str, str]]:
    """Yield the digest of every stored weight and what reads it."""
    for node in nodes_of(model, QLINEAR):
        planes = node.inputs[1]
        if planes is not None and planes.const_value is not None:
            kind = PLUGIN if is_marked(node) else FUNCTION_BODY
            yield digest_of(planes.const_value.numpy()), kind
    for value in model.graph.initializers.values():
        if value.dtype in (ir.DataType.INT4, ir.DataType.INT8) and value.const_value is not None:
            codes = value.const_value.numpy().astype(np.int8)
            for use in value.uses():
                yield digest_of(codes), _reader_kind(use.node)


def _reader_kind(dequantize: ir.Node) -> str:
    """Return what the one reader of a dequantized weight is."""
    users = [use.node for use in dequantize.outputs[0].uses()]
    if dequantize.op_type != "DequantizeLinear" or len(users) != 1:
        return dequantize.op_type
    product = users[0]
    if product.op_type != "MatMul" or product.inputs[1] is not dequantize.outputs[0]:
        return product.op_type
    activation = producer_of(product.inputs[0], "DequantizeLinear")
    if activation is None:
        return WEIGHT_ONLY
    quantized = producer_of(activation.inputs[0], "QuantizeLinear")
    scale = dequantize.inputs[1]
    exact = scale is not None and scale.dtype == ir.DataType.FLOAT
    return INT8_GEMM if quantized is not None and exact else FLOAT_GEMM
