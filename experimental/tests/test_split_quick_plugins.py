"""Graphs for the quick plugins; TensorRT itself is not asked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from experimental.quick_plugins.plugin import PRODUCT_OP, QUANTIZE_OP
from experimental.quick_plugins.split import PASSES, split_file
from tests.hand_layers import lower
from treeq_export.ops import PLUGIN_ATTRIBUTES
from treeq_export.targets.names import TENSORRT

pytestmark = pytest.mark.slow

Make = Callable[..., Any]
KINDS = {int: ir.AttributeType.INT, float: ir.AttributeType.FLOAT, str: ir.AttributeType.STRING}
NAME = "blocks.0.fc"


def split(model: ir.Model) -> tuple[list[Any], list[Any]]:
    """Split a model in place; return its QuantizeTokens and QProduct nodes."""
    for rewrite in PASSES:
        rewrite(model)
    own: list[Any] = [node for node in model.graph if node.domain == "treeq"]
    quantizers = [node for node in own if node.op_type == "QuantizeTokens"]
    products = [node for node in own if node.op_type == "QProduct"]
    assert len(own) == len(quantizers) + len(products)
    return quantizers, products


def read(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def test_nodes_are_what_is_registered(make_layer: Make, make_branch: Make, make_sum_model: Make):
    model = lower(make_sum_model(make_layer(n=12), make_branch()), TENSORRT)
    before: Any = next(node for node in model.graph if node.op_type == "QLinear")
    expected, inputs, output = read(before), list(before.inputs), before.outputs[0].name
    (quantizer,), (product,) = split(model)
    for op, node in ((QUANTIZE_OP, quantizer), (PRODUCT_OP, product)):
        assert op.name == f"{node.domain}::{node.op_type}"
        assert len(node.inputs) == len(op.tensors)
        assert len(node.outputs) == op.num_outputs
        attributes = read(node)
        assert {name: attributes.pop(name) for name in PLUGIN_ATTRIBUTES} == PLUGIN_ATTRIBUTES
        assert list(attributes) == list(op.attributes)
        for name, kind in op.attributes.items():
            assert node.attributes[name].type == KINDS[kind]
            if not name.startswith("has_"):
                assert attributes[name] == expected[name]
    codes, scale = quantizer.outputs
    assert (product.name, quantizer.name) == (before.name, f"{before.name}/codes")
    assert list(quantizer.inputs) == [inputs[0]]
    assert list(product.inputs[:5]) == [codes, inputs[1], scale, inputs[2], inputs[3]]
    assert read(product)["has_bias"] == read(product)["has_addend"] == 1
    assert product.outputs[0].name == output
    assert before not in list(model.graph)
    assert not model.functions


def test_types_and_shapes_are_those_that_the_plugins_describe(make_layer: Make, make_model: Make):
    model = lower(make_model(make_layer()), TENSORRT)
    (quantizer,), (product,) = split(model)
    x, (codes, scale), y = quantizer.inputs[0], quantizer.outputs, product.outputs[0]
    assert (codes.dtype, list(codes.shape)) == (ir.DataType.INT32, [*list(x.shape)[:-1], 32])
    assert (scale.dtype, list(scale.shape)) == (ir.DataType.FLOAT, list(x.shape)[:-1])
    assert y.dtype == x.dtype == ir.DataType.FLOAT16
    assert list(y.shape) == [*list(x.shape)[:-1], read(product)["out_features"]]


def test_without_bias_and_addend_all_inputs_are_there(make_layer: Make, make_model: Make):
    model = make_model(make_layer(bias=False))
    _, (product,) = split(model)
    assert product.inputs[4] is product.inputs[3]
    assert product.inputs[5] is model.graph.inputs[0]
    assert model.graph.outputs[0] is product.outputs[0]
    assert (read(product)["has_bias"], read(product)["has_addend"]) == (0, 0)


@pytest.mark.parametrize(("change", "expected"), [({}, 1), ({"act_bits": 3}, 2)])
def test_layers_of_one_input_and_format_share_their_codes(
    make_layer: Make, make_model: Make, change: dict[str, int], expected: int
):
    first = make_layer(name="blocks.0.q")
    model = make_model(first, make_layer(name="blocks.0.k", seed=1))
    x = model.graph.inputs[0]
    for node in list(model.graph)[1:]:
        if node.op_type == "QLinear":
            node.replace_input_with(0, x)
            for name, value in change.items():
                node.attributes.add(ir.AttrInt64(name, value))
    quantizers, products = split(model)
    assert len(quantizers) == expected
    assert [product.inputs[0] for product in products] == [
        quantizers[0].outputs[0],
        quantizers[-1].outputs[0],
    ]


def test_the_file_shares_the_external_data(
    make_layer: Make, make_branch: Make, make_sum_model: Make, tmp_path: Path
):
    model = lower(make_sum_model(make_layer(n=12), make_branch(2, 2)), TENSORRT)
    path = tmp_path / "model.onnx"
    ir.save(model, path, external_data="model.onnx.data", size_threshold_bytes=0)
    before = path.read_bytes()
    quick = split_file(path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model.onnx",
        "model.onnx.data",
        "model.quick.onnx",
    ]
    loaded = ir.load(quick)
    assert not loaded.functions
    assert loaded.metadata_props == ir.load(path).metadata_props
    product: Any = next(node for node in loaded.graph if node.op_type == "QProduct")
    planes = product.inputs[1].const_value
    assert isinstance(planes, ir.ExternalTensor)
    original: Any = next(node for node in ir.load(path).graph if node.op_type == "QLinear")
    assert np.array_equal(planes.numpy(), original.inputs[1].const_value.numpy())
