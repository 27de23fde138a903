from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir

from tests.hand_layers import lower
from treeq_export.ops import PLUGIN_ATTRIBUTES
from treeq_export.targets.names import TENSORRT

Make = Callable[..., Any]


def test_every_node_names_a_body_that_declares_the_plugin(
    make_layer: Make, make_branch: Make, make_sum_model: Make
):
    model = lower(make_sum_model(make_layer(n=12), make_branch()), TENSORRT)
    nodes = [node for node in model.graph if node.domain == "treeq"]
    assert len(nodes) == len(model.functions) == 2
    for node in nodes:
        function = model.functions[node.op_identifier()]
        assert list(function.attributes) == list(PLUGIN_ATTRIBUTES)
        assert len(function.inputs) == len(node.inputs)
        # Casts at both ends, float32 arithmetic between.
        ends = [n.attributes["to"].as_int() for n in function if n.op_type == "Cast"]
        assert ends[0] == ir.DataType.FLOAT.value
        assert ends[-1] == ir.DataType.FLOAT16.value
        assert function[-1].op_type == "Cast"
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_layers_of_one_structure_share_a_body(
    make_layer: Make, make_model: Make, make_branch: Make, make_sum_model: Make
):
    layers = [make_layer(name=f"blocks.{i}.fc", seed=i, bias=i > 0) for i in range(3)]
    model = lower(make_model(*layers), TENSORRT)
    assert len(model.functions) == 1
    assert len({node.overload for node in model.graph if node.domain == "treeq"}) == 1
    with_branch = lower(make_sum_model(make_layer(n=12), make_branch()), TENSORRT)
    [overload] = [node.overload for node in with_branch.graph if node.op_type == "QLinear"]
    assert overload.endswith("_addend")
