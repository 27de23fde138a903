"""Pass `CheckPatterns`: refuse what TensorRT refuses late, or builds wrong without a warning.

Rules on the finished graph, as seen with TensorRT-RTX 1.7:
1. No value of type UINT4, INT2, UINT2 or FP8 E5M2.
2. Zero points of Q/DQ are zero.
3. A stored INT4 or INT8 constant feeds a DequantizeLinear's or a plugin's input, nothing else.
4. No DynamicQuantizeLinear, MatMulInteger, ConvInteger, QLinearMatMul.
5. Scales of Q/DQ are stored, not computed at run time.
6. A blocked DequantizeLinear has blocks of 16..128, less than the whole axis, and feeds no product
   with quantized activations. (Blocks of 256 were seen to build; what runs then is not known.)
7. Around a product of two dequantized operands everything is float32: both scales, the product and
   the multiply behind it. With float16 TensorRT stores the int32 sum unscaled and it overflows.
8. All floating-point inputs of a node are of one type.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult

from treeq_export.compile.graph.contract import LayerPass
from treeq_export.compile.graph.match import producer_of
from treeq_export.compile.graph.signature import DOMAIN
from treeq_export.compile.graph.value_types import FLOATS, infer_types
from treeq_export.compile.passes.check_formats import MAX_BLOCK, MIN_BLOCK, describe_problems
from treeq_export.errors import CompileError

_UNSUPPORTED_TYPES = frozenset({"UINT4", "INT2", "UINT2", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"})
_REFUSED = frozenset({"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul"})
_NARROW = frozenset({ir.DataType.INT4, ir.DataType.INT8})
_QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
_SCALE, _ZERO_POINT = 1, 2
_REMEDY = "Exclude these layers by search.exclude, or compile for target ort."
# Inputs that are no operands: their type is the op's own matter.
_MIXED = frozenset({"Cast", "QuantizeLinear", "DequantizeLinear", "Shape", "Size"})
Types = dict[ir.Value, ir.DataType]


class CheckPatterns(LayerPass):
    """Check the graph; no known-wrong pattern is in it then."""

    def call(self, model: ir.Model) -> PassResult:
        """Change nothing.

        Raises:
            CompileError: Names the nodes, which bear their layers' names, and the pattern.
        """
        text = describe_problems(_problems(model.graph, infer_types(model.graph)))
        if text:
            raise CompileError(f"{text} {_REMEDY}")
        return PassResult(model, False)


def _problems(graph: ir.Graph, types: Types) -> Iterator[tuple[str, str]]:
    for value, dtype in types.items():
        if dtype.name in _UNSUPPORTED_TYPES:
            yield value.name or "", f"TensorRT has no type {dtype.name}."
        if dtype in _NARROW and ir.convenience.get_const_tensor(value) is not None:
            for reader, position in value.uses():
                if not _may_read(reader, position):
                    problem = (
                        f"TensorRT refuses a stored {dtype.name} that feeds {reader.op_type}; "
                        "only DequantizeLinear and plugins may read it."
                    )
                    yield (reader.name or value.name or "").split("/")[0], problem
    for node in graph:
        name = (node.name or node.outputs[0].name or "").split("/")[0]
        for problem in _node_problems(node, types):
            yield name, problem


def _may_read(node: ir.Node, position: int) -> bool:
    """Whether a stored INT4 or INT8 may be that input of a node."""
    if node.domain == DOMAIN:
        return True
    if position == _ZERO_POINT:
        return is_quantizer(node)
    return node.op_type == "DequantizeLinear" and position == 0


def is_quantizer(node: ir.Node | None) -> bool:
    """Whether a node is QuantizeLinear or DequantizeLinear."""
    return node is not None and node.op_type in _QDQ and not node.domain


def _node_problems(node: ir.Node, types: Types) -> Iterator[str]:
    if node.op_type in _REFUSED and not node.domain:
        yield f"TensorRT refuses {node.op_type}."
    if is_quantizer(node):
        yield from _quantizer_problems(node)
    if node.op_type == "MatMul" and not node.domain:
        yield from _product_problems(node, types)
    if node.domain != DOMAIN and node.op_type not in _MIXED:
        seen = {types[value] for value in node.inputs if value is not None and value in types}
        if len(seen & FLOATS) > 1:
            listed = " and ".join(sorted(dtype.name for dtype in seen & FLOATS))
            yield f"{node.op_type} of {listed}; TensorRT's networks are strongly typed."


def _quantizer_problems(node: ir.Node) -> Iterator[str]:
    zero_point = node.inputs[_ZERO_POINT] if len(node.inputs) > _ZERO_POINT else None
    if zero_point is not None:
        stored = ir.convenience.get_const_tensor(zero_point)
        if stored is None or np.any(stored.numpy().astype(np.float32)):
            yield "TensorRT refuses zero points other than 0."
    scale = node.inputs[_SCALE]
    if scale is None or ir.convenience.get_const_tensor(scale) is None:
        yield "TensorRT computes with Half where a scale of Q/DQ is computed at run time."
    block = node.attributes.get_int("block_size", 0)
    if block:
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        axis = node.attributes.get_int("axis", 1)
        if not MIN_BLOCK <= block <= MAX_BLOCK or (shape is not None and shape[axis] == block):
            yield (
                f"block_size {block} is none of those known to work, {MIN_BLOCK}..{MAX_BLOCK} and "
                "less than the whole axis."
            )


def _product_problems(node: ir.Node, types: Types) -> Iterator[str]:
    operands = [producer_of(value, "DequantizeLinear") for value in node.inputs]
    first, second = operands[0], operands[1]
    if first is None or second is None:
        return
    if any(one.attributes.get_int("block_size", 0) for one in (first, second)):
        yield "TensorRT builds a wrong engine from block-scaled weights and INT8 activations."
    scales = [one.inputs[_SCALE] for one in (first, second)]
    behind = [output for use in node.outputs[0].uses() for output in use.node.outputs]
    around = [*scales, *node.outputs, *behind]
    kinds = {types[value] for value in around if value is not None and value in types}
    if kinds != {ir.DataType.FLOAT}:
        yield (
            "float16 around an Int8 gemm: TensorRT stores the int32 sum unscaled and overflows; "
            "scales, product and the multiply behind it have to be float32."
        )
