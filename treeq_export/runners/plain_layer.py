"""One quantized layer cut out of a compiled graph, as a model with the input x and the output y.

In the `ort` target a layer may share its node with siblings and with a normalisation, an activation
or a gate. What is cut out is the linear alone, with all output channels of the node and its Monarch
branch; a probe takes the layer's own channels of the result.
"""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from treeq_export.errors import RunnerError
from treeq_export.runners.compiled import LayerSite

DOMAIN = "treeq"
QLINEAR, FUSED, MONARCH = "QLinear", "FusedQLinear", "Monarch"
INPUT, OUTPUT = "x", "y"
# Attributes of a FusedQLinear: overloads of the functions of its parts.
LINEAR_FUNCTION, BRANCH_FUNCTION = "linear_function", "branch_function"
_BRANCH_R, _BRANCH_L = 4, 5
_NEUTRAL: Mapping[str, Any] = {"activation": "none", "norm_epsilon": 0.0}


def find_packed_node(model: ir.Model, site: LayerSite) -> ir.Node | None:
    """Return the `treeq` node that computes a layer, None where the target has lowered it."""
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type != MONARCH and node.name == site.node:
            return node
    return None


def own_channels(site: LayerSite, values: NDArray[Any]) -> NDArray[Any]:
    """Return the layer's part of its node's output channels, the last axis."""
    return values[..., site.offset : site.offset + site.size] if site.size else values


def cut_lowered(model: ir.Model, site: LayerSite) -> ir.Model:
    """Return the nodes between a layer's input and output value, for targets without treeq nodes.

    Raises:
        RunnerError: The graph does not have both values.
    """
    if not site.input or not site.output:
        raise RunnerError(f"{site.name}: no such layer in the graph. Compile again.")
    graph = ir.convenience.extract(model.graph, [site.input], [site.output])
    graph.name = site.name
    graph.inputs[0].name, graph.outputs[0].name = INPUT, OUTPUT
    cut = ir.Model(graph, ir_version=model.ir_version, functions=_clone_functions(model))
    ir.external_data.load_to_model(cut)
    return cut


def cut_packed(model: ir.Model, node: ir.Node, *, as_functions: bool) -> ir.Model:
    """Return a packed node's linear and branch.

    Args:
        model: Holds the node and the functions.
        node: A QLinear or FusedQLinear.
        as_functions: As QLinear + Monarch, with their functions; else the node itself, without
            all but its linear and branch, for our kernels.
    """
    inputs = [None if value is None else _copy(value) for value in node.inputs[: _BRANCH_L + 1]]
    x = ir.val(INPUT, ir.DataType.FLOAT, node.inputs[0].shape if node.inputs[0] else None)
    inputs[0] = x
    branch = inputs[_BRANCH_R:]
    if as_functions:
        nodes = _as_functions(node, inputs[:_BRANCH_R], branch)
    else:
        attributes = {name: value.value for name, value in node.attributes.items()}
        neutral = _NEUTRAL if node.op_type == FUSED else {}
        while inputs[-1] is None:
            inputs.pop()
        made = ir.node(node.op_type, inputs, attributes=attributes | dict(neutral), domain=DOMAIN)
        nodes = [made]
    y = nodes[-1].outputs[0]
    y.name, y.type = OUTPUT, ir.TensorType(ir.DataType.FLOAT)
    if x.shape is not None:
        y.shape = ir.Shape([*x.shape[:-1], node.attributes["out_features"].as_int()])
    graph = ir.Graph(
        [x],
        [y],
        nodes=nodes,
        initializers=[value for value in (*inputs[1:4], *branch) if value is not None],
        opset_imports=dict(model.graph.opset_imports),
        name=node.name,
    )
    functions = _clone_functions(model) if as_functions else []
    cut = ir.Model(graph, ir_version=model.ir_version, functions=functions)
    ir.external_data.load_to_model(cut)
    return cut


def _as_functions(
    node: ir.Node, inputs: list[ir.Value | None], branch: list[ir.Value | None]
) -> list[ir.Node]:
    """Return QLinear, and Monarch and Add where there is a branch."""
    overloads = {QLINEAR: node.overload}
    if node.op_type == FUSED:
        overloads = {
            QLINEAR: node.attributes[LINEAR_FUNCTION].as_string(),
            MONARCH: node.attributes.get_string(BRANCH_FUNCTION, ""),
        }
    while inputs[-1] is None:
        inputs.pop()

    def call(op_type: str, values: list[ir.Value | None]) -> ir.Node:
        overload = overloads[op_type]
        return ir.node(op_type, values, domain=DOMAIN, overload=overload, version=1)

    linear = call(QLINEAR, inputs)
    if not branch or branch[0] is None:
        return [linear]
    monarch = call(MONARCH, [inputs[0], *branch])
    return [linear, monarch, ir.node("Add", [linear.outputs[0], monarch.outputs[0]])]


def _copy(value: ir.Value) -> ir.Value:
    """Return an initializer of the same name and contents that belongs to no graph."""
    return ir.val(value.name, const_value=value.const_value)


def _clone_functions(model: ir.Model) -> list[ir.Function]:
    return [function.clone() for function in model.functions.values()]
