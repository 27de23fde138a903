"""Pass `AddFunctionBodies`: give every treeq op a model-local function of standard ONNX.

Rules:
1. Layers of one signature share one overload, named by the signature; the node is set to it.
2. A QLinear body unpacks the planes and then is the form of compile/bodies/qlinear.py. It ends in
   DequantizeLinear + MatMul, which ONNX Runtime folds to INT8 weights and runs as integers.
3. A Monarch body is the batched form of compile/passes/lower_monarch.py.
4. A FusedQLinear body is those two, and what is fused in standard operators. The functions of its
   QLinear and Monarch are added beside it and named by attributes of the node, for who cuts the
   linear out (runners/plain_layer.py). It does not call them: ONNX Runtime does not find overloads
   from inside of a function.

Runs last: optimizers inline model-local functions. A runtime with our kernels takes those instead.
"""

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from treeq_export.compile.bodies.fused import make_fused_function, monarch_overload, read_form
from treeq_export.compile.bodies.qlinear import BodyWriter, write_packed
from treeq_export.compile.graph.fused import BRANCH_L, BRANCH_R, FUSED, input_of
from treeq_export.compile.graph.signature import (
    DOMAIN,
    MONARCH,
    QLINEAR,
    QLinearSignature,
    nodes_of,
    read_signature,
)
from treeq_export.compile.passes.lower_monarch import write_monarch
from treeq_export.runners.plain_layer import BRANCH_FUNCTION, LINEAR_FUNCTION

OPSET = 21


class AddFunctionBodies(InPlacePass):
    """Add the functions; ensures that every treeq node names an overload with a body."""

    def call(self, model: ir.Model) -> PassResult:
        """Change the model in place."""
        for node in nodes_of(model, QLINEAR):
            signature = read_signature(node)
            node.overload = signature.overload
            _add(model, signature.overload, QLINEAR, lambda s=signature: make_qlinear_function(s))
        for node in nodes_of(model, MONARCH):
            shapes = [tuple(_static_shape(node.inputs[index])) for index in (1, 2)]
            node.overload = monarch_overload(*shapes)
            _add(
                model,
                node.overload,
                MONARCH,
                lambda o=node.overload, s=shapes: make_monarch_function(o, s[0], s[1]),
            )
        for node in nodes_of(model, FUSED):
            _add_fused(model, node)
        return PassResult(model, bool(model.functions))


def _add_fused(model: ir.Model, node: ir.Node) -> None:
    """Add the body of a FusedQLinear, and those of its parts."""
    signature = read_signature(node)
    _add(model, signature.overload, QLINEAR, lambda: make_qlinear_function(signature))
    node.attributes.add(ir.AttrString(LINEAR_FUNCTION, signature.overload))
    shapes = None
    if input_of(node, BRANCH_R) is not None:
        r, l_factor = (tuple(_static_shape(node.inputs[i])) for i in (BRANCH_R, BRANCH_L))
        shapes = (r, l_factor)
        name = monarch_overload(r, l_factor)
        _add(model, name, MONARCH, lambda: make_monarch_function(name, r, l_factor))
        node.attributes.add(ir.AttrString(BRANCH_FUNCTION, name))
    form = read_form(node, signature, shapes)
    node.overload = form.overload
    _add(model, form.overload, FUSED, lambda: make_fused_function(form))


def _static_shape(value: ir.Value | None) -> list[int]:
    assert value is not None
    assert value.shape is not None
    return [int(d) for d in value.shape.numpy()]


def _add(model: ir.Model, overload: str, op_type: str, make: Callable[[], ir.Function]) -> None:
    if (DOMAIN, op_type, overload) not in model.functions:
        function = make()
        model.functions[function.identifier()] = function


def _function(
    op_type: str, overload: str, writer: BodyWriter, inputs: list[ir.Value], y: ir.Value
) -> ir.Function:
    graph = ir.Graph(inputs, [y], nodes=writer.tape.nodes, opset_imports={"": OPSET})
    return ir.Function(DOMAIN, op_type, overload, graph=graph, attributes=[])


def make_qlinear_function(signature: QLinearSignature) -> ir.Function:
    """Return the function body of one signature.

    Args:
        signature: Of the layers that share it.

    Returns:
        A function of x, planes, weight_scale and, where there is one, bias.
    """
    names = ["x", "planes", "weight_scale", *(["bias"] if signature.has_bias else [])]
    inputs = [ir.Value(name=name) for name in names]
    writer = BodyWriter()
    bias = inputs[3] if signature.has_bias else None
    y = write_packed(writer, inputs[0], inputs[1], inputs[2], bias, signature)
    return _function(QLINEAR, signature.overload, writer, inputs, y)


def make_monarch_function(
    overload: str, r_shape: tuple[int, ...], l_shape: tuple[int, ...]
) -> ir.Function:
    """Return the function body of one pair of factor shapes: a function of x, R and L."""
    inputs = [ir.Value(name=name) for name in ("x", "R", "L")]
    writer = BodyWriter()
    y = write_monarch(writer, inputs[0], inputs[1], inputs[2], r_shape, l_shape)
    return _function(MONARCH, overload, writer, inputs, y)
