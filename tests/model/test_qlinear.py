"""The quantized modules against the numpy reference."""

import contextlib
import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from treeq_export.model.qlinear import QLinear
from treeq_export.model.zoo import Denoiser
from treeq_export.ops import ActScale
from treeq_export.plan import (
    LayerPlan,
    Tensors,
    TreePath,
)
from treeq_export.quant import numerics
from treeq_export.quant.branch import apply_branch, dense_branch
from treeq_export.quant.grids import INTEGER
from treeq_export.quant.rotation import rotate
from treeq_export.quant.spec import ActivationFormat, BranchFormat, WeightFormat

MakeDenoiser = Callable[..., Denoiser]
SCALES: list[ActScale] = ["token_rms", "token_absmax", "tensor_static"]
K, N = 128, 24


def make_layer(
    weight_bits: int = 4,
    act_bits: int | None = 4,
    scale: ActScale = "token_rms",
    *,
    k: int = K,
    n: int = N,
    name: str = "layer",
    group_size: int | None = None,
    rotation_group: int = 1,
    branch: BranchFormat | None = None,
) -> LayerPlan:
    return LayerPlan(
        name=name,
        in_features=k,
        out_features=n,
        tree=TreePath(block=0, position=name, leaf=0),
        weight=WeightFormat(bits=weight_bits, group_size=group_size),
        activation=ActivationFormat(bits=act_bits, scale="none" if act_bits is None else scale),
        rotation_group=rotation_group,
        branch=branch,
    )


def make_tensors(layer: LayerPlan, seed: int = 0) -> Tensors:
    rng = np.random.default_rng(seed)
    n, k = layer.out_features, layer.in_features
    qmin, qmax = INTEGER.ends(layer.weight.bits)
    groups = k // (layer.weight.group_size or k)
    tensors: Tensors = {
        "codes": rng.integers(qmin, qmax + 1, (n, k)).astype(np.int8),
        "weight_scale": rng.uniform(0.01, 0.1, (n, groups)).astype(np.float32),
    }
    if layer.activation.bits is not None:
        step = numerics.activation_step(layer.activation) or 3.0 / 2**layer.activation.bits
        tensors["activation_step"] = np.array([step], dtype=np.float32)
    if layer.branch is not None:
        b_in, b_out, rank = layer.branch.b_in, layer.branch.b_out, layer.branch.rank
        r_shape, l_shape = (b_in, k // b_in, b_out * rank), (b_out, b_in * rank, n // b_out)
        tensors["branch.R"] = 0.1 * rng.standard_normal(r_shape).astype(np.float32)
        tensors["branch.L"] = 0.1 * rng.standard_normal(l_shape).astype(np.float32)
    return tensors


def make_bias(layer: LayerPlan) -> Tensor:
    return torch.randn(layer.out_features, generator=torch.Generator().manual_seed(5))


def random_input(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=dtype)


def reference(layer: LayerPlan, tensors: Tensors, x: Tensor, bias: Tensor | None) -> np.ndarray:
    step = tensors.get("activation_step")
    y = numerics.qlinear(
        x.numpy(),
        tensors["codes"],
        tensors["weight_scale"],
        activation=layer.activation,
        step=None if step is None else float(step[0]),
        rotation_group=layer.rotation_group,
        bias=None if bias is None else bias.numpy(),
    )
    if layer.branch is not None:
        factors = (tensors["branch.R"], tensors["branch.L"])
        y = y + apply_branch(x.numpy(), *(factor.astype(y.dtype) for factor in factors))
    return y


def codes_of(module: QLinear, x: Tensor) -> Tensor:
    rotated = module.rotate(x)
    return module.quantize(rotated, module.activation_scale(rotated))


def reference_codes(layer: LayerPlan, tensors: Tensors, x: Tensor) -> np.ndarray:
    rotated = rotate(x.numpy(), layer.rotation_group)
    step = float(tensors["activation_step"][0])
    scale = numerics.activation_scale(rotated, layer.activation.scale, step)
    assert layer.activation.bits is not None
    return numerics.quantize_activation(rotated, scale, layer.activation.bits)


# Forward ----------------------------------------------------------------------------------------


def check_against_reference(layer: LayerPlan, *, shape: tuple[int, ...], with_bias: bool) -> None:
    tensors = make_tensors(layer)
    bias = make_bias(layer) if with_bias else None
    module = QLinear(layer, tensors, bias).double()
    x = random_input(*shape, layer.in_features)
    codes, expected_codes = codes_of(module, x), reference_codes(layer, tensors, x)
    assert np.array_equal(codes.numpy(), expected_codes)
    sums = module.accumulate(codes)
    groups = tensors["weight_scale"].shape[1]
    expected_sums = numerics.accumulate(expected_codes, tensors["codes"], groups)
    assert sums.shape == (*shape, groups, layer.out_features)
    assert np.array_equal(sums.numpy(), expected_sums)
    y = module(x)
    assert y.shape == (*shape, layer.out_features)
    # The rotation matrix of the module is float32.
    expected = reference(layer, tensors, x, bias)
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_equals_the_reference(bits: int, scale: ActScale):
    layer = make_layer(bits, bits, scale, rotation_group=32)
    check_against_reference(layer, shape=(9,), with_bias=True)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("rotation_group", [1, 32, 128])
@pytest.mark.parametrize("group_size", [None, 64, 32, 8])
def test_groups_and_rotations_equal_the_reference(
    scale: ActScale, rotation_group: int, group_size: int | None
):
    layer = make_layer(3, 5, scale, group_size=group_size, rotation_group=rotation_group)
    check_against_reference(layer, shape=(2, 5), with_bias=False)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("branch", [None, BranchFormat(b_in=2, b_out=3, rank=4)])
def test_ranks_bias_and_branch(
    shape: tuple[int, ...], with_bias: bool, branch: BranchFormat | None
):
    layer = make_layer(8, 2, rotation_group=128, group_size=64, branch=branch)
    check_against_reference(layer, shape=shape, with_bias=with_bias)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_weight_only_equals_the_reference(
    with_bias: bool, group_size: int | None, shape: tuple[int, ...]
):
    layer = make_layer(3, None, group_size=group_size, rotation_group=64)
    tensors = make_tensors(layer)
    bias = make_bias(layer) if with_bias else None
    module = QLinear(layer, tensors, bias)
    assert module.activation_step is None
    x = random_input(*shape, K)
    expected = reference(layer, tensors, x, bias)
    np.testing.assert_allclose(module(x).detach().numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", ["token_absmax", "tensor_static"])
def test_float32_is_equal_bit_for_bit_without_rotation(scale: ActScale):
    layer = make_layer(4, 6, scale)
    tensors = make_tensors(layer)
    bias = make_bias(layer)
    module = QLinear(layer, tensors, bias)
    # Multiples of 1/64 of the range make many products fall on or beside a border of rounding.
    x = torch.round(random_input(50, K, dtype=torch.float32) * 64) / 64
    assert np.array_equal(codes_of(module, x).numpy(), reference_codes(layer, tensors, x))
    y = module(x)
    assert y.dtype == torch.float32
    assert np.array_equal(y.detach().numpy(), reference(layer, tensors, x, bias))


def test_reciprocal_and_half_to_even():
    layer = make_layer(4, 8, "tensor_static", k=4)
    tensors = make_tensors(layer)
    for step, x, codes in (
        (1.0, [0.5, 1.5, 2.5, -2.5], [0, 2, 2, -2]),
        (1.3, [np.float32(3.5) * np.float32(1.3), 1.3, 300.0, -300.0], [3, 1, 127, -128]),
    ):
        tensors["activation_step"] = np.array([step], dtype=np.float32)
        module = QLinear(layer, tensors, None)
        assert codes_of(module, torch.tensor([x])).tolist() == [codes]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("group_size", [None, 128])
def test_error_is_at_most_twice_that_of_plain_float32(scale: ActScale, group_size: int | None):
    layer = make_layer(4, 4, scale, k=512, n=64, group_size=group_size, rotation_group=128)
    tensors = make_tensors(layer)
    bias = make_bias(layer)
    module = QLinear(layer, tensors, bias)
    x = random_input(64, 512, dtype=torch.float32)
    exact = reference(layer, tensors, x.double(), bias)
    rotated = module.rotate(x)
    s_x = module.activation_scale(rotated)
    q_x = module.quantize(rotated, s_x)
    assert np.array_equal(q_x.numpy(), reference_codes(layer, tensors, x.double()))
    w_hat = numerics.dequantize_weight(tensors["codes"], tensors["weight_scale"])
    plain = functional.linear(q_x * s_x, torch.from_numpy(w_hat), bias)
    plain_error = np.abs(plain.numpy() - exact).max()
    assert plain_error > 0
    assert np.abs(module(x).detach().numpy() - exact).max() <= 2 * plain_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_exact_beyond_24_bits(dtype: torch.dtype):
    k = 4096
    layer = make_layer(8, 8, k=k, n=64)
    rng = np.random.default_rng(0)
    tensors = make_tensors(layer)
    tensors["codes"] = rng.integers(96, 128, (64, k)).astype(np.int8)
    tensors["codes"][0] = -128
    module = QLinear(layer, tensors, None)
    codes = rng.integers(96, 128, (16, k)).astype(np.int8)
    codes[0] = -128
    exact = codes.astype(np.int64) @ tensors["codes"].astype(np.int64).T
    assert np.abs(exact).min() > 1 << 25
    assert exact.max() == k << 14
    sums = module.accumulate(torch.from_numpy(codes).to(dtype))
    assert sums.dtype == dtype
    # One rounding, at the very end, where the sums are held as float32.
    assert np.array_equal(sums[:, 0].numpy(), exact.astype(sums.numpy().dtype))


@pytest.mark.parametrize("scale", SCALES)
def test_a_token_of_zeros_gives_the_bias(scale: ActScale):
    layer = make_layer(4, 4, scale, rotation_group=32)
    bias = make_bias(layer)
    module = QLinear(layer, make_tensors(layer), bias)
    x = random_input(2, 3, K, dtype=torch.float32)
    x[1, 1] = 0
    y = module(x)
    assert torch.equal(y[1, 1], bias)
    assert not torch.equal(y[1, 0], bias)


@pytest.mark.parametrize("scale", ["token_rms", "token_absmax"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_gives_nan_in_its_own_row_only(scale: ActScale, bad: float):
    layer = make_layer(4, 4, scale, rotation_group=32)
    module = QLinear(layer, make_tensors(layer), None)
    x = random_input(4, K, dtype=torch.float32)
    clean = module(x)
    x[2, 5] = bad
    y = module(x)
    others = [0, 1, 3]
    assert y[2].isnan().all()
    assert torch.equal(y[others], clean[others])


# State ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_kept_as_bit_planes(bits: int):
    layer = make_layer(bits, k=100)
    tensors = make_tensors(layer)
    module = QLinear(layer, tensors, None)
    assert module.planes.shape == (bits, N, 4)
    assert module.planes.dtype == torch.int32
    assert np.array_equal(module.codes, tensors["codes"])


def test_only_the_planes_and_the_trainable_tensors_are_saved():
    layer = make_layer(branch=BranchFormat(b_in=1, b_out=1, rank=2))
    module = QLinear(layer, make_tensors(layer), make_bias(layer))
    assert set(module.state_dict()) == {
        "planes",
        "weight_scale",
        "bias",
        "activation_step",
        "branch.R",
        "branch.L",
    }


def test_training_does_not_reach_the_callers_arrays():
    layer = make_layer(branch=BranchFormat(b_in=1, b_out=1, rank=2))
    tensors = make_tensors(layer)
    before = copy.deepcopy(tensors)
    module = QLinear(layer, tensors, None)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    for name, tensor in tensors.items():
        assert np.array_equal(tensor, before[name]), name


def test_nothing_is_trained_unless_asked_for():
    layer = make_layer(branch=BranchFormat(b_in=1, b_out=1, rank=2))
    module = QLinear(layer, make_tensors(layer), make_bias(layer))
    assert not any(parameter.requires_grad for parameter in module.parameters())


# Gradients --------------------------------------------------------------------------------------


def test_gradients_reach_branch_scales_and_input():
    layer = make_layer(4, 4, group_size=32, branch=BranchFormat(b_in=2, b_out=3, rank=2))
    tensors = make_tensors(layer)
    module = QLinear(layer, tensors, None).requires_grad_(True)
    x = random_input(5, K, dtype=torch.float32).requires_grad_()
    weights = random_input(5, N, dtype=torch.float32)
    (module(x) * weights).sum().backward()

    # d y[t, n] / d s_w[n, g] = acc[t, g, n] s_x[t]
    rotated = module.rotate(x.detach())
    s_x = module.activation_scale(rotated)
    sums = module.accumulate(module.quantize(rotated, s_x))
    expected = torch.einsum("tn,tgn,to->ng", weights, sums, s_x)
    assert module.weight_scale.grad is not None
    torch.testing.assert_close(module.weight_scale.grad, expected.detach(), rtol=1e-4, atol=1e-4)

    assert module.branch is not None
    branch = copy.deepcopy(module.branch)
    branch.zero_grad()
    (branch(x.detach()) * weights).sum().backward()
    for factor, alone in ((module.branch.R, branch.R), (module.branch.L, branch.L)):
        assert factor.grad is not None
        assert alone.grad is not None
        assert factor.grad.abs().min() > 0
        torch.testing.assert_close(factor.grad, alone.grad)

    dense = torch.from_numpy(dense_branch(tensors["branch.R"], tensors["branch.L"]))
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert not torch.allclose(x.grad, weights @ dense)  # not through the branch alone
    assert module.activation_step is not None
    assert module.activation_step.grad is not None
    assert module.activation_step.grad.abs() > 0


def test_gradient_of_the_input_is_straight_through_inside_the_range_and_zero_outside():
    layer = make_layer(4, 3, "tensor_static")
    tensors = make_tensors(layer)
    module = QLinear(layer, tensors, None)
    x = random_input(6, K, dtype=torch.float32).requires_grad_()
    weights = random_input(6, N, dtype=torch.float32)
    (module(x) * weights).sum().backward()
    w_hat = torch.from_numpy(numerics.dequantize_weight(tensors["codes"], tensors["weight_scale"]))
    step = float(tensors["activation_step"][0])
    qmin, qmax = INTEGER.ends(3)
    inside = (x.detach() / step > qmin) & (x.detach() / step < qmax)
    assert 0.02 < inside.float().mean() < 0.98
    expected = torch.where(inside, weights @ w_hat, 0.0)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)


def test_gradient_passes_the_rotation():
    layer = make_layer(8, 8, "tensor_static", rotation_group=32)
    tensors = make_tensors(layer)
    tensors["activation_step"] = np.array([0.1], dtype=np.float32)  # nothing is clipped
    module = QLinear(layer, tensors, None)
    x = random_input(6, K, dtype=torch.float32).requires_grad_()
    weights = random_input(6, N, dtype=torch.float32)
    (module(x) * weights).sum().backward()
    w_hat = numerics.dequantize_weight(tensors["codes"], tensors["weight_scale"])
    expected = weights.numpy() @ rotate(w_hat, 32)
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-3, atol=1e-3)


# Export -----------------------------------------------------------------------------------------


def exported_nodes(module: nn.Module, x: Tensor) -> list[Any]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, (x,), dynamo=True, opset_version=21, verbose=False)
    assert program is not None
    return [node for node in program.model.graph if node.domain == "treeq"]


def test_export_is_one_node_with_all_attributes_and_one_for_the_branch():
    layer = make_layer(
        3,
        5,
        "token_absmax",
        group_size=32,
        rotation_group=64,
        branch=BranchFormat(b_in=2, b_out=3, rank=4),
    )
    module = QLinear(layer, make_tensors(layer), make_bias(layer))
    qlinear, monarch = exported_nodes(module, random_input(2, 3, K, dtype=torch.float32))
    assert (qlinear.op_type, qlinear.version) == ("QLinear", 1)
    assert {name: attribute.value for name, attribute in qlinear.attributes.items()} == {
        "weight_bits": 3,
        "act_bits": 5,
        "act_scale": "token_absmax",
        "act_step": pytest.approx(1 / 15),
        "rotation_group": 64,
        "group_size": 32,
        "in_features": K,
        "out_features": N,
    }
    assert [tuple(value.shape) for value in qlinear.inputs] == [
        (2, 3, K),
        (3, N, K // 32),
        (N, K // 32),
        (N,),
    ]
    assert tuple(qlinear.outputs[0].shape) == (2, 3, N)
    assert (monarch.op_type, monarch.version) == ("Monarch", 1)
    assert [tuple(value.shape) for value in monarch.inputs] == [
        (2, 3, K),
        (2, K // 2, 12),
        (3, 8, N // 3),
    ]
    assert tuple(monarch.outputs[0].shape) == (2, 3, N)


def test_export_of_weight_only_without_bias():
    layer = make_layer(4, None)
    (qlinear,) = exported_nodes(
        QLinear(layer, make_tensors(layer), None), random_input(3, K, dtype=torch.float32)
    )
    assert len(qlinear.inputs) == 3
    attributes = {name: attribute.value for name, attribute in qlinear.attributes.items()}
    assert attributes["act_bits"] == 0
    assert attributes["act_scale"] == "none"
    assert attributes["act_step"] == 0.0
    assert attributes["group_size"] == 0
