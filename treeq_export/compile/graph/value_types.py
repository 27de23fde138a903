"""Element types of a lowered graph's values, by operator: what a strongly typed runtime sees."""

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from treeq_export.compile.graph.signature import DOMAIN

_INTEGER_RESULTS = frozenset({"Shape", "Size", "ArgMax", "ArgMin", "NonZero"})
_BOOLEAN_RESULTS = frozenset(
    {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Not", "IsNaN"}
)
# Position of the input that decides the output's type; 0 elsewhere.
_DECIDING = {"DequantizeLinear": 1, "QuantizeLinear": 2, "Where": 1}
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
HALF_MAX = float(np.finfo(np.float16).max)
FLOATS = frozenset({FLOAT, HALF, ir.DataType.BFLOAT16})


def half_array(tensor: ir.TensorProtocol) -> NDArray[np.float16]:
    """Return a float32 tensor in float16, finite where it was finite."""
    array = tensor.numpy()
    clipped = np.clip(array, -HALF_MAX, HALF_MAX)
    return np.where(np.isfinite(array), clipped, array).astype(np.float16)


def infer_types(graph: ir.Graph) -> dict[ir.Value, ir.DataType]:
    """Return the element type of every value whose type follows from the graph.

    Args:
        graph: Topologically sorted; inputs and initializers have types.
    """
    types: dict[ir.Value, ir.DataType] = {}
    stored: Iterable[ir.Value] = (*graph.inputs, *graph.initializers.values())
    for value in stored:
        if value.dtype is not None:
            types[value] = value.dtype
    for node in graph:
        dtype = _result_type(node, types)
        if dtype is not None:
            types.update(dict.fromkeys(node.outputs, dtype))
    return types


def _result_type(node: ir.Node, types: dict[ir.Value, ir.DataType]) -> ir.DataType | None:
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type in ("Constant", "ConstantOfShape"):
        value = node.attributes.get("value")
        return ir.DataType.FLOAT if value is None else value.as_tensor().dtype
    if node.op_type in _INTEGER_RESULTS:
        return ir.DataType.INT64
    if node.op_type in _BOOLEAN_RESULTS:
        return ir.DataType.BOOL
    deciding = 0 if node.domain == DOMAIN else _DECIDING.get(node.op_type, 0)
    if node.op_type == "QuantizeLinear" and len(node.inputs) <= deciding:
        return ir.DataType.UINT8
    value = node.inputs[deciding] if deciding < len(node.inputs) else None
    return None if value is None else types.get(value)
