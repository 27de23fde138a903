"""Pass `AddFunctionBodies`: give every treeq op a model-local function of standard ONNX.

Rules:
1. Layers of one signature share one overload, named by the signature; the node is set to it.
2. A QLinear body unpacks the planes and then is the form of compile/body.py. It ends in
   DequantizeLinear + MatMul, which ONNX Runtime folds to INT8 weights and runs as integers.
3. A Monarch body is the batched form of compile/lower_monarch.py.

Runs last: optimizers inline model-local functions. A runtime with our kernels takes those instead.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from treeq_export.compile.body import (
    BodyWriter,
    write_function_scale,
    write_qlinear,
    write_unpacked_weight,
)
from treeq_export.compile.lower_monarch import write_monarch
from treeq_export.compile.signature import (
    DOMAIN,
    MONARCH,
    QLINEAR,
    QLinearSignature,
    nodes_of,
    read_signature,
)
from treeq_export.quant.rotation import hadamard

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
            node.overload = "_".join("x".join(str(d) for d in shape) for shape in shapes)
            _add(
                model,
                node.overload,
                MONARCH,
                lambda o=node.overload, s=shapes: make_monarch_function(o, s[0], s[1]),
            )
        return PassResult(model, bool(model.functions))


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
    y = write_qlinear(
        writer,
        inputs[0],
        write_unpacked_weight(writer, inputs[1], signature),
        write_function_scale(writer, inputs[2], signature),
        inputs[3] if signature.has_bias else None,
        signature,
        hadamard(signature.rotation_group).astype(np.float32),
    )
    return _function(QLINEAR, signature.overload, writer, inputs, y)


def make_monarch_function(
    overload: str, r_shape: tuple[int, ...], l_shape: tuple[int, ...]
) -> ir.Function:
    """Return the function body of one pair of factor shapes: a function of x, R and L."""
    inputs = [ir.Value(name=name) for name in ("x", "R", "L")]
    writer = BodyWriter()
    y = write_monarch(writer, inputs[0], inputs[1], inputs[2], r_shape, l_shape)
    return _function(MONARCH, overload, writer, inputs, y)
