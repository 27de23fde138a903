from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from treeq_export.compile.passes.name_layers import NameLayers
from treeq_export.runners.graph_meta import LayerSite, read_layers

Make = Callable[..., Any]


def nodes_by_op(model: ir.Model) -> dict[str, list[ir.Node]]:
    found: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        found.setdefault(node.op_type, []).append(node)
    return found


def test_layer_without_branch_ends_at_its_own_node(make_layer: Make, make_model: Make):
    model = make_model(make_layer(name="blocks.0.a"))
    node = model.graph[0]
    relu = ir.node("Relu", [node.outputs[0]])
    model.graph.append(relu)
    model.graph.outputs[0] = relu.outputs[0]
    result = NameLayers()(model)
    assert result.modified
    assert node.name == "blocks.0.a"
    assert node.outputs[0].name == "blocks.0.a.output"
    assert read_layers(model) == [
        LayerSite("blocks.0.a", "x", "blocks.0.a.output", node="blocks.0.a")
    ]


def test_branch_belongs_to_the_layer(make_layer: Make, make_branch: Make, make_sum_model: Make):
    model = make_sum_model(make_layer(n=12), make_branch())
    identity = ir.node("Identity", [model.graph.outputs[0]])
    model.graph.append(identity)
    model.graph.outputs[0] = identity.outputs[0]
    nodes = nodes_by_op(model)
    NameLayers()(model)
    [add], [monarch], [qlinear] = nodes["Add"], nodes["Monarch"], nodes["QLinear"]
    assert monarch.name == "blocks.0.fc/branch"
    assert qlinear.outputs[0].name == "blocks.0.fc/y"
    assert add.outputs[0].name == "blocks.0.fc.output"
    assert read_layers(model) == [
        LayerSite("blocks.0.fc", "x", "blocks.0.fc.output", node="blocks.0.fc")
    ]


def test_branch_on_the_left_of_the_add(make_layer: Make, make_branch: Make, make_sum_model: Make):
    model = make_sum_model(make_layer(n=12), make_branch())
    [add] = nodes_by_op(model)["Add"]
    y, branch = add.inputs
    add.replace_input_with(0, branch)
    add.replace_input_with(1, y)
    NameLayers()(model)
    assert read_layers(model)[0].output == add.outputs[0].name


def test_branch_of_another_layer_is_not_taken(
    make_layer: Make, make_branch: Make, make_sum_model: Make
):
    model = make_sum_model(make_layer(n=12), make_branch(name="blocks.0.other"))
    nodes = nodes_by_op(model)
    NameLayers()(model)
    assert nodes["QLinear"][0].outputs[0].name == "blocks.0.fc.output"
    assert nodes["Add"][0].outputs[0].name == "sum"
    assert nodes["Monarch"][0].name != "blocks.0.fc/branch"
    assert read_layers(model)[0].output == "blocks.0.fc.output"


def test_add_of_something_else_is_not_taken(make_layer: Make, make_model: Make):
    model = make_model(make_layer(name="blocks.0.a"), make_layer(name="blocks.0.b", seed=1))
    first, second = model.graph
    add = ir.node("Add", [first.outputs[0], second.outputs[0]])
    model.graph.append(add)
    model.graph.outputs[:] = [add.outputs[0]]
    NameLayers()(model)
    outputs = [site.output for site in read_layers(model)]
    assert outputs == ["blocks.0.a.output", "blocks.0.b.output"]
    # A residual around the layer: the other operand is a graph input, which no node writes.
    model = make_model(make_layer(n=64))
    add = ir.node("Add", [model.graph[0].outputs[0], model.graph.inputs[0]])
    model.graph.append(add)
    model.graph.outputs[0] = add.outputs[0]
    NameLayers()(model)
    assert read_layers(model)[0].output == "blocks.0.fc.output"


def test_output_with_two_consumers_is_the_node_s(
    make_layer: Make, make_branch: Make, make_sum_model: Make
):
    model = make_sum_model(make_layer(n=12), make_branch())
    [qlinear] = nodes_by_op(model)["QLinear"]
    extra = ir.node("Relu", [qlinear.outputs[0]])
    model.graph.append(extra)
    model.graph.outputs.append(extra.outputs[0])
    NameLayers()(model)
    assert read_layers(model)[0].output == qlinear.outputs[0].name == "blocks.0.fc.output"


def test_graph_outputs_keep_their_names(make_layer: Make, make_branch: Make, make_sum_model: Make):
    model = make_sum_model(make_layer(n=12), make_branch())
    NameLayers()(model)
    assert [value.name for value in model.graph.outputs] == ["sum"]
    assert read_layers(model) == [LayerSite("blocks.0.fc", "x", "sum", node="blocks.0.fc")]


def test_layers_are_listed_in_graph_order(make_layer: Make, make_model: Make):
    names = ["blocks.1.z", "blocks.0.a", "single_blocks.0.m"]
    model = make_model(*(make_layer(name=name) for name in names))
    NameLayers()(model)
    assert [site.name for site in read_layers(model)] == names
    assert [node.name for node in model.graph] == names


def test_model_without_layers_is_left_alone():
    x = ir.val("x", ir.DataType.FLOAT, [2])
    relu = ir.node("Relu", [x], name="only")
    model = ir.Model(ir.Graph([x], relu.outputs, nodes=[relu], name="g"), ir_version=10)
    assert not NameLayers()(model).modified
    assert relu.name == "only"
    assert read_layers(model) == []
