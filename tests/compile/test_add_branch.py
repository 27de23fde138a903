from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest

from treeq_export.compile.passes.add_branch import AddBranch
from treeq_export.compile.passes.name_layers import NameLayers
from treeq_export.ops import QLINEAR
from treeq_export.runners.graph_meta import read_layers

Make = Callable[..., Any]


def test_position_is_that_of_the_definition():
    assert QLINEAR.inputs[4] == "addend"


@pytest.mark.parametrize("bias", [True, False])
def test_branch_becomes_the_addend(
    bias: bool, make_layer: Make, make_branch: Make, make_sum_model: Make
):
    model = make_sum_model(make_layer(n=12, bias=bias), make_branch())
    NameLayers()(model)
    [site] = read_layers(model)
    total = model.graph.outputs[0].name
    assert AddBranch()(model).modified
    monarch, linear = model.graph
    assert (monarch.op_type, linear.op_type) == ("Monarch", "QLinear")
    assert linear.name == site.node == "blocks.0.fc"
    assert linear.inputs[4] is monarch.outputs[0]
    assert (linear.inputs[3] is not None) == bias
    assert linear.inputs[0] is monarch.inputs[0] is model.graph.inputs[0]
    assert linear.outputs[0] is model.graph.outputs[0]
    assert linear.outputs[0].name == total == site.output
    assert linear.attributes["act_bits"].as_int() == 4


def test_a_second_branch_stays_an_add(make_layer: Make, make_branch: Make, make_sum_model: Make):
    model = make_sum_model(make_layer(n=12), make_branch(), make_branch(name="blocks.1.fc"))
    AddBranch()(model)
    assert [node.op_type for node in model.graph] == ["Monarch", "Monarch", "QLinear", "Add"]


def test_sum_of_other_values_stays(make_layer: Make, make_branch: Make, make_sum_model: Make):
    """The branch reads another value than the layer, or its output is read twice."""
    model = make_sum_model(make_layer(n=12), make_branch())
    monarch = next(node for node in model.graph if node.op_type == "Monarch")
    other = ir.val("other", ir.DataType.FLOAT, ["batch", 3, 64])
    model.graph.inputs.append(other)
    monarch.replace_input_with(0, other)
    assert not AddBranch()(model).modified

    model = make_sum_model(make_layer(n=12), make_branch())
    linear = next(node for node in model.graph if node.op_type == "QLinear")
    model.graph.outputs.append(linear.outputs[0])
    assert not AddBranch()(model).modified
    assert [node.op_type for node in model.graph] == ["QLinear", "Monarch", "Add"]
