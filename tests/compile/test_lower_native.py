from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.hand_layers import lower
from treeq_export.compile.graph.value_types import infer_types
from treeq_export.compile.passes.check_patterns import CheckPatterns
from treeq_export.targets.names import TENSORRT_NATIVE

Make = Callable[..., Any]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_weight_goes_straight_into_its_dequantizer(bits: int, make_layer: Make, make_model: Make):
    layer = make_layer(weight_bits=bits)
    model = lower(make_model(layer), TENSORRT_NATIVE)
    stored = model.graph.initializers["blocks.0.fc.weight_quantized"]
    assert stored.dtype == (ir.DataType.INT4 if bits <= 4 else ir.DataType.INT8)
    np.testing.assert_array_equal(stored.const_value.numpy().astype(np.int8), layer.codes.T)
    assert [use.node.op_type for use in stored.uses()] == ["DequantizeLinear"]
    scale = model.graph.initializers["blocks.0.fc.weight_quantized_scale"]
    assert scale.dtype == ir.DataType.FLOAT
    np.testing.assert_array_equal(scale.const_value.numpy(), layer.weight_scale[:, 0])


def test_float32_between_the_casts(make_layer: Make, make_model: Make):
    model = lower(make_model(make_layer()), TENSORRT_NATIVE)
    types = infer_types(model.graph)
    layer = [node for node in model.graph if (node.name or "").startswith("blocks.0.fc/")]
    *inner, last, border = [node for node in layer if node.op_type != "Constant"]
    assert border.outputs[0] is model.graph.outputs[0]
    assert (last.op_type, types[last.outputs[0]]) == ("Cast", ir.DataType.FLOAT16)
    assert {types[node.outputs[0]] for node in inner} == {ir.DataType.FLOAT, ir.DataType.INT8}
    assert {node.domain for node in model.graph} == {""}


def test_layers_of_one_input_share_its_codes(make_layer: Make, make_model: Make):
    layers = [make_layer(name=name, seed=seed) for seed, name in enumerate(["a", "b", "c"])]
    other = make_layer(name="d", seed=3, act_bits=3)
    model = lower(make_model(*layers, other), TENSORRT_NATIVE)
    quantizers = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert [node.name for node in quantizers] == ["a/codes", "d/codes"]
    products = [node for node in model.graph if (node.name or "").endswith("/product")]
    assert [node.name for node in products] == ["a/product", "b/product", "c/product", "d/product"]
    assert not CheckPatterns()(model).modified
