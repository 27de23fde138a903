from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from tests.hand_layers import lower
from treeq_export.compile.passes.fuse_output import FuseOutput
from treeq_export.compile.passes.merge_siblings import MergeSiblings
from treeq_export.compile.passes.name_layers import NameLayers
from treeq_export.runners.graph_meta import LayerSite, read_layers
from treeq_export.runners.ort_runner import OrtRunner
from treeq_export.runners.plain_layer import input_of

Make = Callable[..., Any]
LAYER = "blocks.0.fc"


def put_gelu(model: ir.Model, approximate: str = "tanh") -> None:
    """Let the graph's output be the Gelu of what it was."""
    graph = model.graph
    y = ir.tape.Tape(graph).op("Gelu", [graph.outputs[0]], {"approximate": approximate})
    y.name, graph.outputs[0] = "activated", y
    ShapeInferencePass()(model)


def put_gate(
    model: ir.Model, *, swapped: bool = False, gate_width: int = 13, residual_tokens: int = 3
) -> None:
    """Let the graph's output be residual + Unsqueeze(gate) * what it was."""
    graph = model.graph
    gate = ir.val("gate", ir.DataType.FLOAT, ["batch", gate_width])
    residual = ir.val("residual", ir.DataType.FLOAT, ["batch", residual_tokens, 13])
    graph.inputs.extend([gate, residual])
    tape = ir.tape.Tape(graph)
    row = tape.op("Unsqueeze", [gate, tape.initializer(ir.tensor([1]), "axes")])
    order = slice(None, None, -1 if swapped else 1)
    product = tape.op("Mul", [row, graph.outputs[0]][order])
    total = tape.op("Add", [residual, product][order])
    total.name, graph.outputs[0] = "total", total
    ShapeInferencePass()(model)


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_gelu_becomes_the_activation(make_layer: Make, make_model: Make):
    model = make_model(make_layer())
    put_gelu(model)
    NameLayers()(model)
    assert FuseOutput()(model).modified
    [node] = model.graph
    assert (node.op_type, node.name) == ("FusedQLinear", LAYER)
    assert node.attributes["activation"].as_string() == "gelu_tanh"
    assert node.outputs[0] is model.graph.outputs[0]
    assert node.outputs[0].name == "activated"
    assert read_layers(model) == [LayerSite(LAYER, "x", "", node=LAYER)]
    assert not FuseOutput()(model).modified


@pytest.mark.parametrize("swapped", [False, True])
def test_gate_and_residual_become_inputs(swapped: bool, make_layer: Make, make_model: Make):
    model = make_model(make_layer())
    put_gate(model, swapped=swapped)
    NameLayers()(model)
    assert FuseOutput()(model).modified
    [node] = model.graph
    _, gate, residual = model.graph.inputs
    assert input_of(node, "gate") is gate
    assert input_of(node, "residual") is residual
    assert node.attributes["activation"].as_string() == "none"
    assert model.graph.outputs[0].name == "total"
    assert model.graph.outputs[0].shape == residual.shape
    assert read_layers(model) == [LayerSite(LAYER, "x", "", node=LAYER)]
    assert not FuseOutput()(model).modified


def test_gate_may_follow_the_gelu(make_layer: Make, make_model: Make):
    model = make_model(make_layer())
    put_gelu(model)
    put_gate(model)
    assert FuseOutput()(model).modified
    [node] = model.graph
    assert node.attributes["activation"].as_string() == "gelu_tanh"
    assert input_of(node, "gate") is model.graph.inputs[1]


def test_gelu_behind_the_gate_stays(make_layer: Make, make_model: Make):
    model = make_model(make_layer())
    put_gate(model)
    put_gelu(model)
    assert FuseOutput()(model).modified
    assert op_types(model) == ["FusedQLinear", "Gelu"]
    assert not FuseOutput()(model).modified
    assert op_types(model) == ["FusedQLinear", "Gelu"]


def read_y_again(model: ir.Model) -> None:
    y = ir.tape.Tape(model.graph).op("Relu", [model.graph[0].outputs[0]])
    model.graph.outputs.append(y)


def give_y_out(model: ir.Model) -> None:
    model.graph.outputs.append(model.graph[0].outputs[0])


@pytest.mark.parametrize("spoil", [read_y_again, give_y_out])
@pytest.mark.parametrize("put", [put_gelu, put_gate])
def test_y_that_is_also_read_elsewhere_stays(
    put: Make, spoil: Make, make_layer: Make, make_model: Make
):
    model = make_model(make_layer())
    put(model)
    spoil(model)
    NameLayers()(model)
    sites, nodes = read_layers(model), list(model.graph)
    assert not FuseOutput()(model).modified
    assert list(model.graph) == nodes
    assert read_layers(model) == sites


def test_product_or_gelu_that_is_also_given_out_is_not_passed_over(
    make_layer: Make, make_model: Make
):
    model = make_model(make_layer())
    put_gelu(model)
    activated = model.graph.outputs[0]
    put_gate(model)
    model.graph.outputs.append(activated)
    assert FuseOutput()(model).modified
    assert op_types(model) == ["FusedQLinear", "Unsqueeze", "Mul", "Add"]
    assert model.graph.outputs[1] is model.graph[0].outputs[0]


def test_gelu_by_the_error_function_stays(make_layer: Make, make_model: Make):
    model = make_model(make_layer())
    put_gelu(model, approximate="none")
    assert not FuseOutput()(model).modified
    assert op_types(model) == ["QLinear", "Gelu"]


def test_residual_that_is_broadcast_stays(make_layer: Make, make_model: Make):
    model = make_model(make_layer())
    put_gate(model, residual_tokens=1)
    assert not FuseOutput()(model).modified


def test_gate_that_is_broadcast_stays(make_layer: Make, make_model: Make):
    """The kernel takes a value a channel; one for all of them is not (batch, N)."""
    model = make_model(make_layer())
    put_gate(model, gate_width=1)
    assert not FuseOutput()(model).modified


def test_gate_without_tokens_axis_of_its_own_stays(make_layer: Make, make_model: Make):
    model = make_model(make_layer())
    put_gate(model)
    axes = model.graph.initializers["axes"]
    axes.const_value = ir.tensor([0])
    assert not FuseOutput()(model).modified


def test_merged_node_keeps_what_follows_its_parts(make_layer: Make, make_model: Make):
    model = make_model(*(make_layer(name=f"blocks.0.{name}", n=32) for name in "qk"))
    put_gelu(model)
    NameLayers()(model)
    assert MergeSiblings()(model).modified
    assert not FuseOutput()(model).modified
    assert op_types(model) == ["FusedQLinear", "Gelu"]
    assert [site.output for site in read_layers(model)] == [
        "blocks.0.q.output",
        "blocks.0.k/y",
    ]


@pytest.mark.parametrize("has_gate", [False, True])
@pytest.mark.parametrize("has_gelu", [False, True])
def test_outputs_equal_those_of_the_portable_target(
    has_gelu: bool, has_gate: bool, make_layer: Make, make_model: Make
):
    """The input is the same number for number, so no code flips and only sums differ in order."""
    layer = make_layer()
    rng = np.random.default_rng(3)
    feeds = {"x": layer.x}
    if has_gate:
        feeds["gate"] = rng.standard_normal((2, 13)).astype(np.float32)
        feeds["residual"] = rng.standard_normal((2, 3, 13)).astype(np.float32)
    results = []
    for target, use_kernels in (("portable", False), ("ort", False), ("ort", True)):
        model = make_model(layer)
        if has_gelu:
            put_gelu(model)
        if has_gate:
            put_gate(model)
        lower(model, target)
        assert target == "portable" or len(model.graph) == 1
        serialized = ir.to_proto(model).SerializeToString()
        with OrtRunner(serialized, threads=1, use_kernels=use_kernels) as runner:
            results.append(runner.run(feeds))
    expected, *received = results
    for y in received:
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
