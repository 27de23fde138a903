from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from tests.hand_layers import lower
from treeq_export.compile.graph.signature import read_signature
from treeq_export.compile.passes.add_function_bodies import AddFunctionBodies
from treeq_export.quant.branch import apply_branch

Make = Callable[..., Any]


def overloads(model: ir.Model, op_type: str = "QLinear") -> list[str]:
    return [node.overload for node in model.graph if node.op_type == op_type]


def run_all(model: ir.Model, x: Any) -> list[Any]:
    """Return every output, in ONNX Runtime without any library of ours."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, {"x": x}))


def test_equal_layers_share_one_function(make_layer: Make, make_model: Make):
    layers = [make_layer(name=f"l{i}", seed=i, n=8 + i) for i in range(3)]
    model = make_model(*layers)
    nodes = list(model.graph)
    assert AddFunctionBodies(half=False)(model).modified
    assert list(model.graph) == nodes
    assert len(set(overloads(model))) == len(model.functions) == 1
    assert ("treeq", "QLinear", nodes[0].overload) in model.functions
    for layer, received in zip(layers, run_all(model, layers[0].x), strict=True):
        np.testing.assert_allclose(received, layer.expected, rtol=1e-5, atol=1e-5)


DIFFERENCES: dict[str, dict[str, Any]] = {
    "weight bits": {"weight_bits": 5},
    "activation bits": {"act_bits": 5},
    "scale": {"act_scale": "token_absmax"},
    "static": {"act_scale": "tensor_static"},
    "weight only": {"act_bits": None, "act_scale": "none"},
    "rotation": {"rotation_group": 16},
    "group": {"group_size": 32},
    "bias": {"bias": False},
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_different_layers_have_different_functions(
    difference: str, make_layer: Make, make_model: Make
):
    layers = [make_layer(name="a"), make_layer(name="b", **DIFFERENCES[difference])]
    model = make_model(*layers)
    AddFunctionBodies(half=False)(model)
    assert len(set(overloads(model))) == len(model.functions) == 2
    for layer, received in zip(layers, run_all(model, layers[0].x), strict=True):
        np.testing.assert_allclose(received, layer.expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act_scale", ["token_rms", "token_absmax", "tensor_static"])
def test_layers_with_other_steps_have_other_functions(
    act_scale: str, make_layer: Make, make_model: Make
):
    """The step is a constant of the body; calibration or training may move it in any layer."""
    layers = [make_layer(name=name, act_scale=act_scale) for name in "ab"]
    layers[1].step = float(np.float32(0.8 * layers[1].step))
    model = make_model(*layers)
    AddFunctionBodies(half=False)(model)
    assert len(set(overloads(model))) == 2
    for layer, received in zip(layers, run_all(model, layers[0].x), strict=True):
        np.testing.assert_allclose(received, layer.expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group_size", [None, 16])
def test_weight_only_layers_of_other_widths_share_a_function(
    group_size: int | None, make_layer: Make, make_model: Make
):
    options = {"act_bits": None, "act_scale": "none", "group_size": group_size}
    layers = [make_layer(name=f"n{n}", n=n, **options) for n in (5, 12)]
    model = make_model(*layers)
    AddFunctionBodies(half=False)(model)
    assert len(model.functions) == 1
    for layer, received in zip(layers, run_all(model, layers[0].x), strict=True):
        np.testing.assert_allclose(received, layer.expected, rtol=1e-5, atol=1e-5)


def test_overload_names_are_those_of_the_signature(make_layer: Make, make_model: Make):
    model = make_model(make_layer(bias=False, group_size=16), make_layer(name="b", seed=1))
    AddFunctionBodies(half=False)(model)
    signatures = [read_signature(node) for node in model.graph]
    assert overloads(model) == [signature.overload for signature in signatures]
    assert overloads(model)[0].startswith("w4_a4_token_rms_h32_g16_k64_rank3")
    assert overloads(model)[0].endswith("_nobias")
    assert overloads(model)[1].startswith("w4_a4_token_rms_h32_channel_k64_rank3")
    assert [len(function.inputs) for function in model.functions.values()] == [3, 4]


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("grid", [(1, 1, 3), (2, 2, 2), (4, 3, 1)])
def test_branch_equals_the_reference(
    grid: tuple[int, int, int],
    rank: int,
    make_branch: Make,
    make_sum_model: Make,
    run_onnx: Make,
):
    branch = make_branch(*grid)
    model = make_sum_model(None, branch, rank=rank)
    AddFunctionBodies(half=False)(model)
    [overload] = overloads(model, "Monarch")
    assert ("treeq", "Monarch", overload) in model.functions
    x = np.random.default_rng(0).standard_normal((5, 64) if rank == 2 else (2, 3, 64))
    x = x.astype(np.float32)
    expected = apply_branch(x, branch.R, branch.L)
    np.testing.assert_allclose(run_onnx(model, x), expected, rtol=1e-5, atol=1e-5)


def test_branches_of_other_shapes_have_other_functions(make_branch: Make, make_sum_model: Make):
    model = make_sum_model(
        None, make_branch(2, 2, 1), make_branch(2, 2, 1, name="b"), make_branch(1, 2, 2, name="c")
    )
    AddFunctionBodies(half=False)(model)
    first, second, third = overloads(model, "Monarch")
    assert first == second != third
    assert len(model.functions) == 2


@pytest.mark.parametrize("target", ["portable", "ort"])
def test_layer_with_branch(
    target: str, make_layer: Make, make_branch: Make, make_sum_model: Make, run_onnx: Make
):
    layer, branch = make_layer(n=12), make_branch(2, 3, 2)
    model = lower(make_sum_model(layer, branch), target)
    expected = layer.expected + apply_branch(layer.x, branch.R, branch.L)
    np.testing.assert_allclose(run_onnx(model, layer.x), expected, rtol=1e-5, atol=1e-4)


def test_model_without_ops_is_left_alone():
    x = ir.val("x", ir.DataType.FLOAT, [2])
    relu = ir.node("Relu", [x])
    model = ir.Model(ir.Graph([x], relu.outputs, nodes=[relu], name="g"), ir_version=10)
    assert not AddFunctionBodies(half=False)(model).modified
    assert not model.functions
