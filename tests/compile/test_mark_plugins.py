from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.hand_layers import lower
from treeq_export.compile.passes.mark_plugins import MarkPlugins
from treeq_export.ops import DOMAIN, PLUGIN_ATTRIBUTES, PLUGINS
from treeq_export.targets.names import TENSORRT

Make = Callable[..., Any]
KINDS = {
    int: ir.AttributeType.INT,
    float: ir.AttributeType.FLOAT,
    str: ir.AttributeType.STRING,
}


def test_nodes_hold_exactly_the_fields_of_the_definition(
    make_layer: Make, make_branch: Make, make_sum_model: Make
):
    model = lower(make_sum_model(make_layer(n=12), make_branch()), TENSORRT)
    nodes = {node.op_type: node for node in model.graph if node.domain == DOMAIN}
    assert set(nodes) == {op.name for op in PLUGINS}
    for op in PLUGINS:
        attributes = dict(nodes[op.name].attributes)
        for name, value in PLUGIN_ATTRIBUTES.items():
            assert attributes.pop(name).as_string() == value
        assert {name: a.type for name, a in attributes.items()} == {
            name: KINDS[kind] for name, kind in op.attributes.items()
        }
        assert len(nodes[op.name].inputs) == len(op.inputs)


def test_types_are_those_of_the_plugin(make_layer: Make, make_branch: Make, make_sum_model: Make):
    model = lower(make_sum_model(make_layer(n=12), make_branch()), TENSORRT)
    kinds = {
        node.op_type: [value.dtype.name for value in (*node.inputs, *node.outputs)]
        for node in model.graph
        if node.domain == DOMAIN
    }
    half, full = "FLOAT16", "FLOAT"
    assert kinds["QLinear"] == [half, "INT32", full, full, half, half]
    assert kinds["Monarch"] == [half] * 4


def test_layers_without_bias_share_zeros(make_layer: Make, make_model: Make):
    layers = [make_layer(bias=False, name=f"blocks.{i}.fc", seed=i) for i in range(2)]
    model = make_model(*layers, make_layer(name="blocks.2.fc", seed=2))
    MarkPlugins()(model)
    biases = [node.inputs[3] for node in model.graph]
    assert biases[0] is biases[1]
    assert biases[0].name == "treeq.zero_bias_13"
    stored = biases[0].const_value.numpy()
    assert (stored.dtype, stored.shape, stored.any()) == (np.float32, (13,), False)
    assert biases[2].name == "model.blocks.2.fc.bias"


@pytest.mark.parametrize(("group_size", "expected"), [(None, 0), (64, 0), (32, 32)])
def test_one_group_is_one_scale_per_channel(
    group_size: int | None, expected: int, make_layer: Make, make_model: Make
):
    model = make_model(make_layer(group_size=group_size))
    MarkPlugins()(model)
    assert model.graph[0].attributes["group_size"].as_int() == expected
