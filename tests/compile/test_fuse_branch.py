from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.hand_layers import lower
from treeq_export.compile.passes.fuse_branch import FuseBranch
from treeq_export.compile.passes.name_layers import NameLayers
from treeq_export.quant.branch import apply_branch
from treeq_export.runners.graph_meta import LayerSite, read_layers
from treeq_export.runners.ort_runner import OrtRunner
from treeq_export.runners.plain_layer import input_of

Make = Callable[..., Any]


def swap_add(model: ir.Model) -> None:
    """Let the Add read the branch first."""
    add = model.graph[-1]
    first, second = add.inputs
    add.replace_input_with(0, second)
    add.replace_input_with(1, first)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("swapped", [False, True])
def test_branch_becomes_inputs_of_its_layer(
    swapped: bool, bias: bool, make_layer: Make, make_branch: Make, make_sum_model: Make
):
    model = make_sum_model(make_layer(n=12, bias=bias), make_branch(2, 3, 2))
    if swapped:
        swap_add(model)
    NameLayers()(model)
    sites, before = read_layers(model), dict(model.graph.initializers)
    assert FuseBranch()(model).modified
    [node] = model.graph
    assert (node.domain, node.op_type, node.name) == ("treeq", "FusedQLinear", "blocks.0.fc")
    assert input_of(node, "x") is model.graph.inputs[0]
    assert input_of(node, "branch_R") is before["model.blocks.0.fc.branch.R"]
    assert input_of(node, "branch_L") is before["model.blocks.0.fc.branch.L"]
    assert input_of(node, "bias") is before.get("model.blocks.0.fc.bias")
    assert node.inputs[-1] is input_of(node, "branch_L")
    assert node.attributes["out_features"].as_int() == 12
    assert node.attributes["activation"].as_string() == "none"
    [y] = model.graph.outputs
    assert y is node.outputs[0]
    assert (y.name, y.dtype, str(y.shape)) == ("sum", ir.DataType.FLOAT, "[batch,3,12]")
    assert dict(model.graph.initializers) == before
    assert read_layers(model) == sites == [LayerSite("blocks.0.fc", "x", "sum", node="blocks.0.fc")]
    assert not FuseBranch()(model).modified
    assert list(model.graph) == [node]


def read_again(model: ir.Model, value: ir.Value) -> None:
    model.graph.outputs.append(ir.tape.Tape(model.graph).op("Relu", [value]))


def give_out(model: ir.Model, value: ir.Value) -> None:
    model.graph.outputs.append(value)


@pytest.mark.parametrize("spoil", [read_again, give_out])
@pytest.mark.parametrize("op_type", ["QLinear", "Monarch"])
def test_product_that_is_also_read_elsewhere_stays(
    op_type: str, spoil: Make, make_layer: Make, make_branch: Make, make_sum_model: Make
):
    model = make_sum_model(make_layer(n=12), make_branch())
    [node] = [node for node in model.graph if node.op_type == op_type]
    spoil(model, node.outputs[0])
    before = list(model.graph)
    assert not FuseBranch()(model).modified
    assert list(model.graph) == before


def test_branch_of_another_input_stays(make_layer: Make, make_branch: Make, make_sum_model: Make):
    model = make_sum_model(make_layer(n=12), make_branch())
    _, monarch, _ = model.graph
    other = ir.val("other", ir.DataType.FLOAT, model.graph.inputs[0].shape)
    model.graph.inputs.append(other)
    monarch.replace_input_with(0, other)
    assert not FuseBranch()(model).modified
    assert [node.op_type for node in model.graph] == ["QLinear", "Monarch", "Add"]


def test_difference_is_not_a_sum(make_layer: Make, make_branch: Make, make_sum_model: Make):
    model = make_sum_model(make_layer(n=12), make_branch())
    model.graph[-1].op_type = "Sub"
    assert not FuseBranch()(model).modified


def test_second_branch_is_added_as_before(
    make_layer: Make, make_branch: Make, make_sum_model: Make
):
    model = make_sum_model(make_layer(n=12), make_branch(), make_branch(name="blocks.0.more"))
    assert FuseBranch()(model).modified
    fused, monarch, add = (
        next(node for node in model.graph if node.op_type == op_type)
        for op_type in ("FusedQLinear", "Monarch", "Add")
    )
    assert len(model.graph) == 3
    assert input_of(fused, "branch_R").name == "model.blocks.0.fc.branch.R"
    assert list(add.inputs) == [fused.outputs[0], monarch.outputs[0]]
    assert not FuseBranch()(model).modified


def test_layer_without_branch_stays(make_layer: Make, make_model: Make):
    model = make_model(make_layer())
    before = list(model.graph)
    assert not FuseBranch()(model).modified
    assert list(model.graph) == before


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("grid", [(1, 1, 3), (2, 3, 2), (4, 1, 1)])
def test_outputs_equal_those_of_the_portable_target(
    grid: tuple[int, int, int],
    rank: int,
    make_layer: Make,
    make_branch: Make,
    make_sum_model: Make,
):
    """The input is the same number for number, so no code flips and only sums differ in order."""
    layer, branch = make_layer(n=12, rank=rank), make_branch(*grid)
    expected = layer.expected + apply_branch(layer.x, branch.R, branch.L)
    for target, use_kernels in (("portable", False), ("ort", False), ("ort", True)):
        model = lower(make_sum_model(layer, branch, rank=rank), target)
        serialized = ir.to_proto(model).SerializeToString()
        with OrtRunner(serialized, threads=1, use_kernels=use_kernels) as runner:
            y = runner.run({"x": layer.x})
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
