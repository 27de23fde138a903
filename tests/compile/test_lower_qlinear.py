from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.hand_layers import lower
from treeq_export.compile.bodies.storage import zero_points
from treeq_export.compile.graph.signature import read_signature
from treeq_export.compile.passes.lower_qlinear import LowerQLinear
from treeq_export.errors import CompileError
from treeq_export.quant.grids import INTEGER
from treeq_export.runners.graph_meta import read_layers
from treeq_export.targets.table import TARGETS as ALL_TARGETS

Make = Callable[..., Any]


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_have_the_smallest_type_that_holds_them(
    bits: int, make_layer: Make, make_model: Make
):
    layer = make_layer(weight_bits=bits)
    model = make_model(layer)
    assert LowerQLinear()(model).modified
    stored = model.graph.initializers["blocks.0.fc.weight_quantized"]
    assert stored.dtype == (ir.DataType.INT4 if bits <= 4 else ir.DataType.INT8)
    np.testing.assert_array_equal(stored.const_value.numpy().astype(np.int8), layer.codes.T)
    [consumer] = [use.node.op_type for use in stored.uses()]
    assert consumer == ("Cast" if bits <= 4 else "DequantizeLinear")
    scale = model.graph.initializers["blocks.0.fc.weight_quantized_scale"]
    np.testing.assert_array_equal(scale.const_value.numpy(), layer.weight_scale[:, 0])


@pytest.mark.parametrize(
    ("weight_bits", "act_bits", "group_size", "codes_zero", "weight_zero"),
    [
        (7, 8, None, np.int8(0), np.int8(0)),
        (8, 7, None, np.uint8(65), np.int8(0)),
        (8, 2, None, np.uint8(3), np.int8(0)),
        (8, 8, None, np.uint8(128), np.uint8(128)),
        (4, 3, 16, np.uint8(5), np.int8(0)),
        (7, 8, 16, np.uint8(128), np.int8(0)),
        (8, 8, 16, np.uint8(128), np.uint8(128)),
    ],
)
def test_zero_points_keep_pairs_of_products_in_16_bits(
    weight_bits: int,
    act_bits: int,
    group_size: int | None,
    codes_zero: Any,
    weight_zero: Any,
    make_layer: Make,
    make_model: Make,
):
    layer = make_layer(weight_bits=weight_bits, act_bits=act_bits, group_size=group_size)
    model = make_model(layer)
    [node] = model.graph
    zeros = zero_points(read_signature(node))
    assert zeros == (codes_zero, weight_zero)
    assert [zero.dtype for zero in zeros] == [codes_zero.dtype, weight_zero.dtype]
    LowerQLinear()(model)
    [quantize] = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    stored = quantize.inputs[2].producer().attributes["value"].as_tensor()
    assert (stored.numpy(), stored.dtype.numpy()) == (codes_zero, codes_zero.dtype)
    weight = model.graph.initializers["blocks.0.fc.weight_quantized"].const_value.numpy()
    expected = layer.codes.T.reshape(weight.shape).astype(int) + int(weight_zero)
    np.testing.assert_array_equal(weight.astype(int), expected)
    assert (weight.dtype == np.uint8) == (weight_zero.dtype == np.uint8)


@pytest.mark.parametrize("group_size", [None, 16])
def test_no_pair_of_products_leaves_16_bits(
    group_size: int | None, make_layer: Make, make_model: Make
):
    """UINT8 times INT8 on x86, INT8 times INT8 on Arm; a runtime turns one into the other by 128.

    What a runtime turns may be any 8-bit number: it does not know of the clipping.
    """
    for weight_bits, act_bits in product(range(2, 9), range(2, 9)):
        layer = make_layer(weight_bits=weight_bits, act_bits=act_bits, group_size=group_size)
        [node] = make_model(layer).graph
        zeros = zero_points(read_signature(node))
        if zeros.weight.dtype == np.uint8:
            assert (weight_bits, act_bits) == (8, 8)
            continue
        codes = np.array([0, 255])
        if zeros.codes.dtype == np.uint8:
            codes = np.array(INTEGER.ends(act_bits)) + int(zeros.codes)
        assert codes.min() >= 0
        assert codes.max() <= 255
        weights = np.array(INTEGER.ends(weight_bits))
        for activations in (codes, codes - 128):
            pairs = 2 * np.outer(activations, weights)
            assert pairs.min() >= -32768
            assert pairs.max() <= 32767


def test_groups_come_first(make_layer: Make, make_model: Make):
    layer = make_layer(group_size=16, weight_bits=6)
    model = make_model(layer)
    LowerQLinear()(model)
    stored = model.graph.initializers["blocks.0.fc.weight_quantized"].const_value.numpy()
    scale = model.graph.initializers["blocks.0.fc.weight_quantized_scale"].const_value.numpy()
    assert stored.shape == (4, 16, 13)
    np.testing.assert_array_equal(stored.reshape(64, 13), layer.codes.T)
    assert scale.shape == (4, 1, 13)
    np.testing.assert_array_equal(scale[2, 0], layer.weight_scale[:, 2])


def test_output_keeps_its_name_type_and_shape(make_layer: Make, make_model: Make):
    model = make_model(make_layer())
    before = model.graph.outputs[0]
    name, shape = before.name, before.shape
    LowerQLinear()(model)
    after = model.graph.outputs[0]
    assert after is not before
    assert (after.name, after.shape, after.dtype) == (name, shape, ir.DataType.FLOAT)
    assert after.shape is not None
    assert str(after.shape[0]) == "batch"


def test_nodes_and_values_bear_the_layer_s_name(make_layer: Make, make_model: Make):
    model = make_model(make_layer(name="blocks.0.a"), make_layer(name="blocks.0.b", seed=1))
    LowerQLinear()(model)
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    assert {name.split("/")[0] for name in names if name} == {"blocks.0.a", "blocks.0.b"}
    assert {"blocks.0.a/codes", "blocks.0.b/codes"} <= {
        node.outputs[0].name for node in model.graph
    }


def test_rotation_matrix_is_shared(make_layer: Make, make_model: Make):
    model = make_model(
        make_layer(name="a", rotation_group=32),
        make_layer(name="b", rotation_group=32, seed=1),
        make_layer(name="c", rotation_group=8, seed=2),
        make_layer(name="d", rotation_group=1, seed=3),
    )
    LowerQLinear()(model)
    matrices = {
        name: len(value.uses())
        for name, value in model.graph.initializers.items()
        if name.startswith("treeq.hadamard")
    }
    assert matrices == {"treeq.hadamard_32": 2, "treeq.hadamard_8": 1}


def test_domain_goes_with_its_last_node(
    make_layer: Make, make_branch: Make, make_sum_model: Make, make_model: Make
):
    model = make_model(make_layer())
    LowerQLinear()(model)
    assert "treeq" not in model.opset_imports
    # A branch that is still there needs it.
    model = make_sum_model(make_layer(n=12), make_branch())
    LowerQLinear()(model)
    assert "treeq" in model.opset_imports
    model = lower(make_sum_model(make_layer(n=12), make_branch()), "portable")
    assert "treeq" not in model.opset_imports


def test_model_without_layers_is_left_alone(make_branch: Make, make_sum_model: Make):
    model = make_sum_model(None, make_branch())
    before = list(model.graph)
    assert not LowerQLinear()(model).modified
    assert list(model.graph) == before
    assert "treeq" in model.opset_imports


@pytest.mark.parametrize("shape", [None, ["batch", 3, "width"]])
def test_unknown_input_shape_is_an_error(
    shape: list[int | str] | None, make_layer: Make, make_model: Make
):
    model = make_model(make_layer())
    model.graph.inputs[0].shape = None if shape is None else ir.Shape(shape)
    with pytest.raises(CompileError, match=r"^blocks\.0\.fc: .*shape of x"):
        LowerQLinear()(model)


def test_portable_holds_standard_operators_only(
    make_layer: Make, make_branch: Make, make_sum_model: Make
):
    model = lower(make_sum_model(make_layer(n=12), make_branch(2, 2, 2)), "portable")
    assert {node.domain for node in model.graph} == {""}
    assert not model.functions
    assert not [name for name in model.graph.initializers if name.endswith("planes")]
    assert model.metadata_props["treeq.target"] == "portable"


def test_illegal_squeeze_before_a_layer_keeps_its_site(make_layer: Make, make_model: Make):
    """The layer's recorded input has to exist after all passes of every target."""
    for target in (each.name for each in ALL_TARGETS if each.audit is not None):
        model = make_model(make_layer())
        [node] = model.graph
        x = model.graph.inputs[0]
        axes = ir.val("axes", const_value=ir.tensor(np.array([1])))
        model.graph.register_initializer(axes)
        squeeze = ir.node("Squeeze", [x, axes])
        squeeze.outputs[0].name, squeeze.outputs[0].shape = "squeezed", x.shape
        model.graph.insert_before(node, squeeze)
        node.replace_input_with(0, squeeze.outputs[0])
        lower(model, target)
        [site] = read_layers(model)
        assert {site.input, site.output} <= set(ir.convenience.create_value_mapping(model.graph))
