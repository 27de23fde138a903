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
from treeq_export.ops import (
    DOMAIN,
    FUSED,
    MONARCH,
    OPS,
    QLINEAR,
    VERSION,
    LayerFormat,
    OpDefinition,
)
from treeq_export.runners.graph_meta import LayerSite

INPUT, OUTPUT = "x", "y"
# Attributes of a FusedQLinear: overloads of the functions of its parts.
LINEAR_FUNCTION, BRANCH_FUNCTION = "linear_function", "branch_function"
_LAYER, _BRANCH = ("planes", "weight_scale", "bias"), ("branch_R", "branch_L")
_OPS = {op.name: op for op in OPS}
_NEUTRAL: Mapping[str, Any] = {"activation": "none", "norm_epsilon": 0.0}


def input_of(node: ir.Node, name: str) -> ir.Value | None:
    """Return an input of a `treeq` node, None where it is left out or the op has none of the name.

    Args:
        node: A node of the domain.
        name: Name in the op's definition.
    """
    op = _OPS[node.op_type]
    return op.pick(node.inputs, name) if name in op.inputs else None


def read_format(node: ir.Node) -> LayerFormat:
    """Return the layer that a QLinear or FusedQLinear node computes."""
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    return LayerFormat.from_attributes(values)


def find_packed_node(model: ir.Model, site: LayerSite) -> ir.Node | None:
    """Return the `treeq` node that computes a layer, None where the target has lowered it."""
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type != MONARCH.name and node.name == site.node:
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
        as_functions: Whether the result is QLinear + Monarch with their functions, or the node
            itself with only its linear and branch, for our kernels.
    """
    source = input_of(node, "x")
    x = ir.val(INPUT, ir.DataType.FLOAT, source.shape if source else None)
    linear, branch = (
        [_copy(input_of(node, name)) for name in names] for names in (_LAYER, _BRANCH)
    )
    if as_functions:
        nodes = _as_functions(node, [x, *linear], branch)
    else:
        attributes = {name: value.value for name, value in node.attributes.items()}
        neutral = _NEUTRAL if node.op_type == FUSED.name else {}
        inputs = without_trailing([x, *linear, *branch])
        made = ir.node(node.op_type, inputs, attributes=attributes | dict(neutral), domain=DOMAIN)
        nodes = [made]
    y = nodes[-1].outputs[0]
    y.name, y.type = OUTPUT, ir.TensorType(ir.DataType.FLOAT)
    if x.shape is not None:
        y.shape = ir.Shape([*x.shape[:-1], read_format(node).out_features])
    graph = ir.Graph(
        [x],
        [y],
        nodes=nodes,
        initializers=[value for value in (*linear, *branch) if value is not None],
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
    if node.op_type == FUSED.name:
        overloads = {
            QLINEAR: node.attributes[LINEAR_FUNCTION].as_string(),
            MONARCH: node.attributes.get_string(BRANCH_FUNCTION, ""),
        }

    def call(op: OpDefinition, values: list[ir.Value | None]) -> ir.Node:
        overload = overloads[op]
        return ir.node(op.name, values, domain=DOMAIN, overload=overload, version=VERSION)

    linear = call(QLINEAR, without_trailing(inputs))
    if branch[0] is None:
        return [linear]
    monarch = call(MONARCH, [inputs[0], *branch])
    return [linear, monarch, ir.node("Add", [linear.outputs[0], monarch.outputs[0]])]


def without_trailing(inputs: list[ir.Value | None]) -> list[ir.Value | None]:
    """Return a node's inputs without the optional ones at the end that are left out."""
    given = [index for index, value in enumerate(inputs) if value is not None]
    return inputs[: given[-1] + 1]


def _copy(value: ir.Value | None) -> ir.Value | None:
    """Return an initializer of the same name and contents that belongs to no graph."""
    return None if value is None else ir.val(value.name, const_value=value.const_value)


def _clone_functions(model: ir.Model) -> list[ir.Function]:
    return [function.clone() for function in model.functions.values()]
