"""Model-local functions: the bodies of `treeq` ops, so that any runtime can run a file.

The nodes of one structure share a function, which bears the structure's name as its overload. In a
float16 body, a function computes in float32 between Casts, with the addend added before the last
one, as the kernels do; plugin_namespace and plugin_version are then declared as attributes of the
function, since TensorRT takes its plugin for a node that has them.
"""

from collections.abc import Sequence

import onnx_ir as ir

from treeq_export import ops
from treeq_export.compile.bodies.monarch import write_monarch
from treeq_export.compile.bodies.packed import write_packed
from treeq_export.compile.bodies.writer import BodyWriter
from treeq_export.compile.graph.signature import DOMAIN, MONARCH, QLINEAR, QLinearSignature
from treeq_export.compile.graph.value_types import FLOAT, HALF
from treeq_export.ops import OPSET, PLUGIN_ATTRIBUTES

_BIAS, _ADDEND = 3, 4
BranchShapes = tuple[tuple[int, ...], tuple[int, ...]]


def qlinear_overload(signature: QLinearSignature, *, has_addend: bool) -> str:
    """Return the name of the function of a `treeq::QLinear`."""
    return f"{signature.overload}_addend" if has_addend else signature.overload


def monarch_overload(shapes: BranchShapes) -> str:
    """Return the name of the function of a `treeq::Monarch` with factors of these shapes."""
    return "_".join("x".join(str(size) for size in shape) for shape in shapes)


def make_qlinear_function(
    signature: QLinearSignature, *, half: bool = False, has_addend: bool = False
) -> ir.Function:
    """Return the function of a `treeq::QLinear`.

    Args:
        signature: Formats and sizes of the layers that share it.
        half: Whether it stands in a float16 body.
        has_addend: Whether the node has a fifth input; the layers have a bias then.

    Returns:
        A function of x, planes, weight_scale and, where the layers have them, bias and addend.
    """
    names = ops.QLINEAR.inputs[: _BIAS + signature.has_bias + has_addend]
    inputs = [ir.Value(name=name) for name in names]
    writer = BodyWriter()
    x = writer.op("Cast", inputs[0], to=FLOAT.value) if half else inputs[0]
    bias = inputs[_BIAS] if signature.has_bias else None
    y = write_packed(writer, x, inputs[1], inputs[2], bias, signature)
    if has_addend:
        y = writer.op("Add", y, writer.op("Cast", inputs[_ADDEND], to=FLOAT.value))
    overload = qlinear_overload(signature, has_addend=has_addend)
    return _finish(QLINEAR, overload, writer, inputs, y, half=half)


def make_monarch_function(shapes: BranchShapes, *, half: bool = False) -> ir.Function:
    """Return the function of a `treeq::Monarch`.

    Args:
        shapes: Shapes of R and L.
        half: Whether it stands in a float16 body.

    Returns:
        A function of x, R and L.
    """
    inputs = [ir.Value(name=name) for name in ops.MONARCH.inputs]
    writer = BodyWriter()
    values = [writer.op("Cast", value, to=FLOAT.value) for value in inputs] if half else inputs
    y = write_monarch(writer, values[0], values[1], values[2], *shapes)
    return _finish(MONARCH, monarch_overload(shapes), writer, inputs, y, half=half)


def _finish(
    op_type: str,
    overload: str,
    writer: BodyWriter,
    inputs: Sequence[ir.Value],
    y: ir.Value,
    *,
    half: bool,
) -> ir.Function:
    if half:
        y = writer.op("Cast", y, to=HALF.value)
    names = PLUGIN_ATTRIBUTES if half else ()
    declared = [ir.Attr(name, ir.AttributeType.STRING, None) for name in names]
    return make_function(op_type, overload, writer, inputs, [y], declared)


def make_function(
    op_type: str,
    overload: str,
    writer: BodyWriter,
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    declared: Sequence[ir.Attr] = (),
) -> ir.Function:
    """Return what a writer has recorded as a function.

    Args:
        op_type: The `treeq` op.
        overload: Name of its structure.
        writer: Holds the nodes.
        inputs: Inputs, by the names of the op's definition.
        outputs: What the nodes compute.
        declared: Attributes that a node may have.
    """
    graph = ir.Graph(inputs, outputs, nodes=writer.tape.nodes, opset_imports={"": OPSET})
    return ir.Function(DOMAIN, op_type, overload, graph=graph, attributes=list(declared))
