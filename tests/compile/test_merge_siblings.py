from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from treeq_export.compile.passes.add_function_bodies import AddFunctionBodies
from treeq_export.compile.passes.fuse_branch import FuseBranch
from treeq_export.compile.passes.merge_siblings import MergeSiblings
from treeq_export.compile.passes.name_layers import NameLayers
from treeq_export.quant.branch import apply_branch
from treeq_export.quant.packing import pack
from treeq_export.runners.graph_meta import LayerSite, read_layers
from treeq_export.runners.ort_runner import OrtRunner
from treeq_export.runners.plain_layer import input_of

Make = Callable[..., Any]


def make_siblings(make_model: Make, layers: list[Any], branches: list[Any] = ()) -> ir.Model:
    """Return layers that read "x", the first ones with branches, an output each."""
    model = make_model(*layers)
    graph, tape = model.graph, ir.tape.Tape(model.graph)
    for index, branch in enumerate(branches):
        node, values = branch.make_node(graph.inputs[0])
        for value in values:
            graph.register_initializer(value)
        graph.append(node)
        y = graph.outputs[index]
        total = tape.op("Add", [y, node.outputs[0]])
        total.type, total.shape, total.name = y.type, y.shape, f"{branch.name}/sum"
        graph.outputs[index] = total
    NameLayers()(model)
    FuseBranch()(model)
    return model


def run(model: ir.Model, x: Any, *, use_kernels: bool = True) -> list[Any]:
    """Return all outputs; the model has to pass onnx.checker."""
    model = model.clone()
    AddFunctionBodies(half=False)(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    with OrtRunner(proto.SerializeToString(), threads=1, use_kernels=use_kernels) as runner:
        return list(runner.run_all({"x": x}).values())


def packed_names(model: ir.Model) -> list[str | None]:
    return [node.name for node in model.graph if node.domain == "treeq"]


def test_three_siblings_become_one_node(make_layer: Make, make_branch: Make, make_model: Make):
    layers = [make_layer(name=f"blocks.0.to_{c}", n=32, seed=s) for s, c in enumerate("qkv")]
    branches = [make_branch(2, 1, 3, n=32, name=layer.name) for layer in layers]
    for index, branch in enumerate(branches):
        branch.R, branch.L = branch.R + index, branch.L - index
    model = make_siblings(make_model, layers, branches)
    names = [value.name for value in model.graph.outputs]
    assert MergeSiblings()(model).modified
    [node] = model.graph
    name = "blocks.0.to_q+to_k+to_v"
    assert (node.op_type, node.name) == ("FusedQLinear", name)
    assert list(model.graph.outputs) == list(node.outputs)
    assert [value.name for value in node.outputs] == names
    assert [str(value.shape) for value in node.outputs] == ["[batch,3,32]"] * 3
    assert node.attributes["out_features"].as_int() == 96
    stacked = {
        "planes": pack(np.concatenate([layer.codes for layer in layers]), 4),
        "weight_scale": np.concatenate([layer.weight_scale for layer in layers]),
        "bias": np.concatenate([layer.bias for layer in layers]),
        "branch_R": np.concatenate([branch.R for branch in branches], axis=2),
        "branch_L": np.concatenate([branch.L for branch in branches]),
    }
    for part, expected in stacked.items():
        np.testing.assert_array_equal(input_of(node, part).const_value.numpy(), expected)
    assert list(model.graph.initializers) == [
        f"model.{name}.{key}" for key in ("planes", "weight_scale", "bias", "branch.R", "branch.L")
    ]
    assert read_layers(model) == [
        LayerSite(layer.name, "x", output, name, offset, 32)
        for layer, output, offset in zip(layers, names, (0, 32, 64), strict=True)
    ]
    assert not MergeSiblings()(model).modified
    assert list(model.graph) == [node]


FORMATS: dict[str, dict[str, Any]] = {
    "W4A4": {},
    "W3A8 without bias": {"weight_bits": 3, "act_bits": 8, "bias": False},
    "groups": {"group_size": 32, "act_scale": "token_absmax"},
    "static": {"act_scale": "tensor_static", "rotation_group": 64},
    "weight only": {"act_bits": None, "act_scale": "none"},
}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("grid", [None, (1, 1, 4), (2, 2, 2)])
@pytest.mark.parametrize("name", FORMATS)
def test_outputs_equal_those_of_the_single_nodes(
    name: str,
    grid: tuple[int, int, int] | None,
    count: int,
    make_layer: Make,
    make_branch: Make,
    make_model: Make,
):
    """Bit for bit where one program runs both, in our kernels."""
    layers = [make_layer(name=f"l{i}", n=64, seed=i, **FORMATS[name]) for i in range(count)]
    branches = [make_branch(*grid, n=64, name=layer.name) for layer in layers if grid is not None]
    for index, branch in enumerate(branches):
        branch.R, branch.L = branch.R + index, branch.L - index
    single = make_siblings(make_model, layers, branches)
    merged = single.clone()
    assert MergeSiblings()(merged).modified
    assert len(merged.graph) == 1
    x = layers[0].x
    for expected, received in zip(run(single, x), run(merged, x), strict=True):
        np.testing.assert_array_equal(received, expected)
    expected = [layer.expected for layer in layers]
    for y, branch in zip(expected, branches, strict=False):
        y += apply_branch(x, branch.R, branch.L)
    for reference, body in zip(expected, run(merged, x, use_kernels=False), strict=True):
        atol = 1e-5 * np.abs(reference).max()
        np.testing.assert_allclose(body, reference, rtol=0, atol=atol)


DIFFERENCES: dict[str, dict[str, Any]] = {
    "weight bits": {"weight_bits": 5},
    "activation bits": {"act_bits": 5},
    "scale": {"act_scale": "token_absmax"},
    "weight only": {"act_bits": None, "act_scale": "none"},
    "rotation": {"rotation_group": 16},
    "group": {"group_size": 32},
    "bias": {"bias": False},
    "outputs": {"n": 64},
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_other_formats_are_not_merged(difference: str, make_layer: Make, make_model: Make):
    options = {"n": 32} | DIFFERENCES[difference]
    model = make_siblings(make_model, [make_layer(name="a", n=32), make_layer(name="b", **options)])
    before, sites = list(model.graph), read_layers(model)
    assert not MergeSiblings()(model).modified
    assert list(model.graph) == before
    assert read_layers(model) == sites


def test_other_steps_are_not_merged(make_layer: Make, make_model: Make):
    layers = [make_layer(name=name, n=32) for name in "ab"]
    layers[1].step = float(np.nextafter(np.float32(layers[1].step), np.float32(1)))
    assert not MergeSiblings()(make_siblings(make_model, layers)).modified


@pytest.mark.parametrize("n", [16, 48])
def test_outputs_have_to_fill_the_kernels_tiles(n: int, make_layer: Make, make_model: Make):
    layers = [make_layer(name=name, n=n) for name in "ab"]
    assert not MergeSiblings()(make_siblings(make_model, layers)).modified


@pytest.mark.parametrize("grids", [[(1, 1, 3)], [(1, 1, 3), (1, 1, 2)], [(1, 2, 2), (2, 2, 2)]])
def test_other_branches_are_not_merged(
    grids: list[tuple[int, int, int]], make_layer: Make, make_branch: Make, make_model: Make
):
    layers = [make_layer(name=name, n=32) for name in "ab"]
    branches = [
        make_branch(*grid, n=32, name=layer.name)
        for grid, layer in zip(grids, layers, strict=False)
    ]
    assert not MergeSiblings()(make_siblings(make_model, layers, branches)).modified


def test_layers_of_other_inputs_are_no_siblings(make_layer: Make, make_model: Make):
    model = make_model(*(make_layer(name=name, n=32) for name in "ab"))
    other = ir.val("other", ir.DataType.FLOAT, model.graph.inputs[0].shape)
    model.graph.inputs.append(other)
    model.graph[1].replace_input_with(0, other)
    assert not MergeSiblings()(model).modified


def test_four_alike_are_not_merged(make_layer: Make, make_model: Make):
    model = make_siblings(make_model, [make_layer(name=name, n=32) for name in "abcd"])
    assert not MergeSiblings()(model).modified
    assert packed_names(model) == ["a", "b", "c", "d"]


def test_those_that_agree_are_merged_beside_another(make_layer: Make, make_model: Make):
    layers = [
        make_layer(name="blocks.0.q", n=32),
        make_layer(name="blocks.0.k", n=32, act_bits=6, seed=1),
        make_layer(name="blocks.0.v", n=32, seed=2),
    ]
    model = make_siblings(make_model, layers)
    assert MergeSiblings()(model).modified
    assert sorted(packed_names(model)) == ["blocks.0.k", "blocks.0.q+v"]
    places = [(site.name, site.node, site.offset, site.size) for site in read_layers(model)]
    assert places == [
        ("blocks.0.q", "blocks.0.q+v", 0, 32),
        ("blocks.0.k", "blocks.0.k", 0, 0),
        ("blocks.0.v", "blocks.0.q+v", 32, 32),
    ]
    for layer, y in zip(layers, run(model, layers[0].x), strict=True):
        np.testing.assert_allclose(y, layer.expected, rtol=1e-5, atol=1e-5)
    assert not MergeSiblings()(model).modified


def test_node_stands_before_the_readers_of_all_its_outputs(make_layer: Make, make_model: Make):
    """The first sibling's output may be read before the last sibling in the graph's order."""
    model = make_siblings(make_model, [make_layer(name=name, n=32) for name in "ab"])
    first = model.graph[0]
    reader = ir.node("Relu", [first.outputs[0]])
    reader.outputs[0].type, reader.outputs[0].shape = first.outputs[0].type, first.outputs[0].shape
    model.graph.insert_after(first, reader)
    model.graph.outputs[0] = reader.outputs[0]
    assert MergeSiblings()(model).modified
    assert [node.op_type for node in model.graph] == ["FusedQLinear", "Relu"]
