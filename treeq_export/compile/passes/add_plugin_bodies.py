"""Pass `AddPluginBodies`: function bodies of plugin nodes, so that any runtime can run the file.

Rules:
1. A body is that of the `ort` target (bodies/qlinear.py) between a Cast to float32 and one to
   float16, with the addend added in float32 before the latter, as the kernels do.
2. plugin_namespace and plugin_version are declared as attributes of the function; TensorRT takes
   its plugin for a node that has them.
3. Nodes of one structure share an overload.

Runs last: optimizers inline model-local functions.
"""

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from treeq_export import ops
from treeq_export.compile.bodies.fused import OPSET, monarch_overload
from treeq_export.compile.bodies.qlinear import BodyWriter, write_packed
from treeq_export.compile.graph.signature import (
    DOMAIN,
    MONARCH,
    QLINEAR,
    QLinearSignature,
    nodes_of,
    read_signature,
)
from treeq_export.compile.passes.add_branch import ADDEND
from treeq_export.compile.passes.lower_monarch import write_monarch
from treeq_export.ops import PLUGIN_ATTRIBUTES

_FLOAT, _HALF = ir.DataType.FLOAT.value, ir.DataType.FLOAT16.value


class AddPluginBodies(InPlacePass):
    """Add the functions; ensures that every treeq node names an overload with a body."""

    def call(self, model: ir.Model) -> PassResult:
        """Change the model in place."""
        for node in nodes_of(model, QLINEAR):
            signature, has_addend = read_signature(node), len(node.inputs) > ADDEND
            overload = f"{signature.overload}_addend" if has_addend else signature.overload
            node.overload = overload
            _add(
                model,
                overload,
                QLINEAR,
                lambda s=signature, a=has_addend, o=overload: make_qlinear_function(o, s, a),
            )
        for node in nodes_of(model, MONARCH):
            r_shape, l_shape = (_static_shape(node.inputs[index]) for index in (1, 2))
            node.overload = monarch_overload(r_shape, l_shape)
            _add(
                model,
                node.overload,
                MONARCH,
                lambda o=node.overload, r=r_shape, f=l_shape: make_monarch_function(o, r, f),
            )
        return PassResult(model, bool(model.functions))


def _static_shape(value: ir.Value | None) -> tuple[int, ...]:
    assert value is not None
    assert value.shape is not None
    return tuple(int(d) for d in value.shape.numpy())


def _add(model: ir.Model, overload: str, op_type: str, make: Callable[[], ir.Function]) -> None:
    if (DOMAIN, op_type, overload) not in model.functions:
        function = make()
        model.functions[function.identifier()] = function


def make_qlinear_function(
    overload: str, signature: QLinearSignature, has_addend: bool
) -> ir.Function:
    """Return the body of one signature: a function of x, planes, weight_scale, bias, addend.

    Args:
        overload: Its name.
        signature: Of the layers that share it; they have a bias.
        has_addend: Whether there is a fifth input.
    """
    inputs = [ir.Value(name=name) for name in ops.QLINEAR.inputs[: ADDEND + has_addend]]
    writer = BodyWriter()
    x = writer.op("Cast", inputs[0], to=_FLOAT)
    y = write_packed(writer, x, inputs[1], inputs[2], inputs[3], signature)
    if has_addend:
        y = writer.op("Add", y, writer.op("Cast", inputs[ADDEND], to=_FLOAT))
    return _function(QLINEAR, overload, writer, inputs, writer.op("Cast", y, to=_HALF))


def make_monarch_function(
    overload: str, r_shape: tuple[int, ...], l_shape: tuple[int, ...]
) -> ir.Function:
    """Return the body of one pair of factor shapes: a function of x, R and L."""
    inputs = [ir.Value(name=name) for name in ops.MONARCH.inputs]
    writer = BodyWriter()
    x, r_factor, l_factor = (writer.op("Cast", value, to=_FLOAT) for value in inputs)
    y = write_monarch(writer, x, r_factor, l_factor, r_shape, l_shape)
    return _function(MONARCH, overload, writer, inputs, writer.op("Cast", y, to=_HALF))


def _function(
    op_type: str, overload: str, writer: BodyWriter, inputs: list[ir.Value], y: ir.Value
) -> ir.Function:
    graph = ir.Graph(inputs, [y], nodes=writer.tape.nodes, opset_imports={"": OPSET})
    declared = [ir.Attr(name, ir.AttributeType.STRING, None) for name in PLUGIN_ATTRIBUTES]
    return ir.Function(DOMAIN, op_type, overload, graph=graph, attributes=declared)
