from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from tests.hand_layers import lower
from treeq_export.compile.passes.add_function_bodies import AddFunctionBodies
from treeq_export.compile.passes.fuse_modulate import FuseModulate
from treeq_export.compile.passes.merge_siblings import MergeSiblings
from treeq_export.compile.passes.name_layers import NameLayers
from treeq_export.runners.graph_meta import LayerSite, read_layers
from treeq_export.runners.ort_runner import OrtRunner
from treeq_export.runners.plain_layer import input_of

Make = Callable[..., Any]
EPSILON = 1e-6
UNFUSED = ["LayerNormalization", "Unsqueeze", "Add", "Mul", "Unsqueeze", "Add"]


def constant(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    """Return the initializer of that name, added where it is missing."""
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(array)))
    return graph.initializers[name]


def modulate(model: ir.Model, *positions: int, swapped: bool = False) -> ir.Model:
    """Put LayerNormalization(x) * (1 + scale) + shift before the layers at these positions.

    Every call adds inputs of its own, "scale" and "shift" and the first position.
    """
    graph = model.graph
    nodes = [node for node in graph if node.domain == "treeq"]
    x = graph.inputs[0]
    rows = [
        ir.val(f"{name}{positions[0]}", ir.DataType.FLOAT, ["batch", 64])
        for name in ("scale", "shift")
    ]
    graph.inputs.extend(rows)
    tape, order = ir.tape.Tape(graph), slice(None, None, -1 if swapped else 1)
    ones = constant(graph, "ones", np.ones(64, np.float32))
    axes, one = constant(graph, "axes", np.array([1])), constant(graph, "one", np.float32(1))
    norm = tape.op("LayerNormalization", [x, ones], {"axis": -1, "epsilon": EPSILON})
    factor = tape.op("Add", [tape.op("Unsqueeze", [rows[0], axes]), one][order])
    product = tape.op("Mul", [norm, factor][order])
    shifted = tape.op("Add", [product, tape.op("Unsqueeze", [rows[1], axes])][order])
    shifted.name = f"modulated{positions[0]}"
    for position in positions:
        nodes[position].replace_input_with(0, shifted)
    graph.sort()
    ShapeInferencePass()(model)
    assert shifted.shape == x.shape
    return model


def find(model: ir.Model, op_type: str) -> ir.Node:
    """Return the last node of a type."""
    return [node for node in model.graph if node.op_type == op_type][-1]


@pytest.mark.parametrize("swapped", [False, True])
def test_modulation_becomes_inputs_of_its_layer(swapped: bool, make_layer: Make, make_model: Make):
    model = modulate(make_model(make_layer()), 0, swapped=swapped)
    NameLayers()(model)
    assert read_layers(model)[0].input == "modulated0"
    assert FuseModulate()(model).modified
    [node] = model.graph
    assert (node.op_type, node.name) == ("FusedQLinear", "blocks.0.fc")
    x, scale, shift = model.graph.inputs
    assert input_of(node, "x") is x
    assert input_of(node, "norm_scale") is scale
    assert input_of(node, "norm_shift") is shift
    assert node.attributes["norm_epsilon"].as_float() == pytest.approx(EPSILON)
    [y] = model.graph.outputs
    assert y is node.outputs[0]
    assert "ones" not in model.graph.initializers
    assert read_layers(model) == [LayerSite("blocks.0.fc", "", str(y.name), node="blocks.0.fc")]
    assert not FuseModulate()(model).modified
    assert list(model.graph) == [node]


def test_epsilon_that_is_not_written_is_onnx_s_own(make_layer: Make, make_model: Make):
    model = modulate(make_model(make_layer()), 0)
    find(model, "LayerNormalization").attributes.pop("epsilon")
    assert FuseModulate()(model).modified
    assert model.graph[0].attributes["norm_epsilon"].as_float() == pytest.approx(1e-5)


def weigh(model: ir.Model) -> None:
    ones = np.ones(64, np.float32)
    ones[5] = 1.001
    model.graph.initializers["ones"].const_value = ir.tensor(ones)


def shift_norm(model: ir.Model) -> None:
    bias = constant(model.graph, "norm_bias", np.zeros(64, np.float32))
    norm = find(model, "LayerNormalization")
    norm.resize_inputs(3)
    norm.replace_input_with(2, bias)


def widen_norm(model: ir.Model) -> None:
    find(model, "LayerNormalization").attributes.add(ir.AttrInt64("axis", 1))


def add_two(model: ir.Model) -> None:
    model.graph.initializers["one"].const_value = ir.tensor(np.float32(2))


def turn_rows(model: ir.Model) -> None:
    model.graph.initializers["axes"].const_value = ir.tensor(np.array([0]))


def read_again(op_type: str) -> Callable[[ir.Model], None]:
    def spoil(model: ir.Model) -> None:
        y = ir.tape.Tape(model.graph).op("Relu", [find(model, op_type).outputs[0]])
        model.graph.outputs.append(y)

    return spoil


def give_out(op_type: str) -> Callable[[ir.Model], None]:
    def spoil(model: ir.Model) -> None:
        model.graph.outputs.append(find(model, op_type).outputs[0])

    return spoil


OTHERS: dict[str, Callable[[ir.Model], None]] = {
    "weight that is not ones": weigh,
    "bias of the norm": shift_norm,
    "norm over tokens": widen_norm,
    "2 + scale": add_two,
    "a row a token": turn_rows,
    "norm read elsewhere": read_again("LayerNormalization"),
    "product read elsewhere": read_again("Mul"),
    "sum read elsewhere": read_again("Add"),
    "norm given out": give_out("LayerNormalization"),
    "product given out": give_out("Mul"),
    "sum given out": give_out("Add"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_forms_stay(name: str, make_layer: Make, make_model: Make):
    model = modulate(make_model(make_layer()), 0)
    NameLayers()(model)
    OTHERS[name](model)
    before, sites = list(model.graph), read_layers(model)
    assert not FuseModulate()(model).modified
    assert list(model.graph) == before
    assert read_layers(model) == sites


def test_siblings_are_fused_once_they_are_merged(make_layer: Make, make_model: Make):
    layers = [make_layer(name=f"blocks.0.{name}", n=32, seed=s) for s, name in enumerate("qk")]
    model = modulate(make_model(*layers), 0, 1)
    NameLayers()(model)
    assert not FuseModulate()(model).modified
    assert MergeSiblings()(model).modified
    assert FuseModulate()(model).modified
    [node] = model.graph
    assert node.name == "blocks.0.q+k"
    assert len(node.outputs) == 2
    assert list(model.graph.outputs) == list(node.outputs)
    assert [(site.input, site.offset, site.size) for site in read_layers(model)] == [
        ("", 0, 32),
        ("", 32, 32),
    ]


def test_only_the_fused_layer_loses_its_input(make_layer: Make, make_model: Make):
    model = modulate(make_model(make_layer(name="a"), make_layer(name="b", seed=1)), 1)
    NameLayers()(model)
    FuseModulate()(model)
    assert [site.input for site in read_layers(model)] == ["x", ""]


def test_layers_with_other_modulations_of_one_x_are_no_siblings(make_layer: Make, make_model: Make):
    layers = [make_layer(name=name, n=32, seed=seed) for seed, name in enumerate("ab")]
    model = modulate(modulate(make_model(*layers), 0), 1)
    NameLayers()(model)
    assert FuseModulate()(model).modified
    assert [input_of(node, "x").name for node in model.graph] == ["x", "x"]
    assert not MergeSiblings()(model).modified


def test_modulation_before_a_fused_one_stays(make_layer: Make, make_model: Make):
    model = modulate(make_model(make_layer()), 0)
    FuseModulate()(model)
    outer = list(model.graph.inputs[1:])
    for value, name in zip(outer, ("outer_scale", "outer_shift"), strict=True):
        value.name = name
    modulate(model, 0)
    assert not FuseModulate()(model).modified
    assert [input_of(find(model, "FusedQLinear"), n) for n in ("norm_scale", "norm_shift")] == outer


@pytest.mark.parametrize("count", [1, 3])
def test_outputs_equal_those_of_the_portable_target(count: int, make_layer: Make, make_model: Make):
    """Sums differ in order, also before the quantizer: this input has no value at a border."""
    layers = [make_layer(name=name, n=32, seed=s) for s, name in enumerate("qkv"[:count])]
    rng = np.random.default_rng(5)
    feeds = {name: rng.standard_normal((2, 64)).astype(np.float32) for name in ("scale0", "shift0")}
    feeds["x"] = (3 + 2 * rng.standard_normal((2, 3, 64))).astype(np.float32)
    results = []
    for target, use_kernels in (("portable", False), ("ort", False), ("ort", True)):
        model = lower(modulate(make_model(*layers), *range(count)), target)
        assert target == "portable" or len(model.graph) == 1
        serialized = ir.to_proto(model).SerializeToString()
        with OrtRunner(serialized, threads=1, use_kernels=use_kernels) as runner:
            results.append(np.stack(list(runner.run_all(feeds).values())))
    expected, *received = results
    for y in received:
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("use_kernels", [False, True])
def test_normalised_rows_have_mean_0_and_variance_1(
    use_kernels: bool, make_layer: Make, make_model: Make
):
    """A weight-only layer with the matrix 1: what comes out is the modulated x itself."""
    layer = make_layer(act_bits=None, act_scale="none", n=64, rotation_group=1, bias=False)
    layer.codes = np.eye(64, dtype=np.int8)
    layer.weight_scale = np.ones((64, 1), np.float32)
    model = modulate(make_model(layer), 0)
    FuseModulate()(model)
    AddFunctionBodies(half=False)(model)
    x = layer.x.astype(np.float64)
    rng = np.random.default_rng(6)
    scale, shift = rng.standard_normal((2, 2, 64)).astype(np.float32)
    centred = x - x.mean(-1, keepdims=True)
    norm = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
    expected = norm * (1 + scale[:, None]) + shift[:, None]
    serialized = ir.to_proto(model).SerializeToString()
    with OrtRunner(serialized, threads=1, use_kernels=use_kernels) as runner:
        y = runner.run({"x": layer.x, "scale0": scale, "shift0": shift})
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
