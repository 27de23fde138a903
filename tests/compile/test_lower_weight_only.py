from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.hand_layers import lower
from treeq_export.targets.names import ENGINES

Make = Callable[..., Any]


def lower_layer(target: str, make_layer: Make, make_model: Make, **options: Any) -> Any:
    layer = make_layer(act_bits=None, act_scale="none", **options)
    return layer, lower(make_model(layer), target)


@pytest.mark.parametrize("target", ENGINES)
@pytest.mark.parametrize("group_size", [None, 16, 32])
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_form(bits: int, group_size: int | None, target: str, make_layer: Make, make_model: Make):
    layer, model = lower_layer(
        target, make_layer, make_model, weight_bits=bits, group_size=group_size
    )
    assert not [node for node in model.graph if node.domain == "treeq"]
    [dequantize] = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    weight, scale = dequantize.inputs
    assert weight.dtype == (ir.DataType.INT4 if bits <= 4 else ir.DataType.INT8)
    assert scale.dtype == ir.DataType.FLOAT16
    np.testing.assert_array_equal(weight.const_value.numpy().astype(np.int8), layer.codes.T)
    expected = layer.weight_scale.T.astype(np.float16)
    if group_size is None:
        np.testing.assert_array_equal(scale.const_value.numpy(), expected[0])
        assert dequantize.attributes["axis"].as_int() == 1
        assert "block_size" not in dequantize.attributes
    else:
        np.testing.assert_array_equal(scale.const_value.numpy(), expected)
        assert dequantize.attributes["axis"].as_int() == 0
        assert dequantize.attributes["block_size"].as_int() == group_size
    [product] = [use.node for use in dequantize.outputs[0].uses()]
    assert product.op_type == "MatMul"
    assert not [node for node in model.graph if node.op_type == "QuantizeLinear"]


def test_scales_stay_positive(make_layer: Make, make_model: Make):
    """A dead channel has a scale that rounds to zero in float16."""
    layer = make_layer(act_bits=None, act_scale="none")
    layer.weight_scale[3] = 1e-12
    model = lower(make_model(layer), "tensorrt-native")
    scale = model.graph.initializers["blocks.0.fc.weight_quantized_scale"].const_value.numpy()
    assert (scale > 0).all()
    assert scale[3] == np.float16(2.0**-24)


@pytest.mark.parametrize("group_size", [None, 16, 32])
@pytest.mark.parametrize("bits", [2, 4])
def test_form_for_onnx_runtime(
    bits: int, group_size: int | None, make_layer: Make, make_model: Make
):
    """As for TensorRT, in float32."""
    layer, model = lower_layer(
        "portable", make_layer, make_model, weight_bits=bits, group_size=group_size
    )
    [dequantize] = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    weight, scale = dequantize.inputs
    assert (weight.dtype, scale.dtype) == (ir.DataType.INT4, ir.DataType.FLOAT)
    np.testing.assert_array_equal(weight.const_value.numpy().astype(np.int8), layer.codes.T)
    expected = layer.weight_scale.T if group_size else layer.weight_scale[:, 0]
    np.testing.assert_array_equal(scale.const_value.numpy(), expected)
    assert dequantize.attributes.get_int("block_size", 0) == (group_size or 0)
    assert {node.domain for node in model.graph} == {""}
    stored = [value.dtype for value in model.graph.initializers.values()]
    assert ir.DataType.FLOAT16 not in stored


@pytest.mark.parametrize("options", [{"weight_bits": 5}, {"weight_bits": 8}, {"group_size": 8}])
def test_layers_without_a_fast_block_product_stay_float(
    options: dict[str, Any], make_layer: Make, make_model: Make
):
    _, model = lower_layer("portable", make_layer, make_model, **options)
    assert not [node for node in model.graph if node.op_type == "DequantizeLinear"]
