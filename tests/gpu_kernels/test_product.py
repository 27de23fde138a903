"""Every product kernel of the written list, in the interpreter, against quant/numerics."""

from types import ModuleType

import numpy as np
import pytest
import torch
from treeq_gpu import choose
from treeq_gpu import instantiations as inst
from treeq_gpu.instantiations import INSTANTIATIONS, Instantiation

from tests.gpu_kernels.conftest import assert_as_exact_as_torch, deinterleave, make_product
from tests.hand_layers import make_format
from treeq_export.quant import numerics
from treeq_export.quant.grids import INTEGER
from treeq_export.quant.packing import pack
from treeq_export.quant.spec import ActivationFormat

TORCH_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
PRODUCTS = [i for i in INSTANTIATIONS.values() if i.kernel == "qlinear_kernel"]
PARTIALS = [i for i in INSTANTIATIONS.values() if i.kernel == "qlinear_partials_kernel"]
FINISHES = [i for i in INSTANTIATIONS.values() if i.kernel == "finish_kernel"]


def shape_of(instantiation: Instantiation) -> tuple[int, int, int, int]:
    """Return (m, n, k, group_size): a tile and a bit, odd, and K past a step and not of 32."""
    c = instantiation.constants
    step = c.get("GROUP_SIZE", 0)
    k, group_size = (step * 4, step * 2) if step else (c["BK"] + 40, 0)
    m = min(c["BM"] + 5, 16) if instantiation.shape_class == "token" else c["BM"] + 5
    return m, c["BN"] + 3, k, group_size


@pytest.mark.parametrize("instantiation", PRODUCTS, ids=lambda i: i.name)
def test_product_equals_reference(instantiation: Instantiation, gpu: ModuleType):
    bits, dtype = instantiation.constants["BITS"], TORCH_TYPES[instantiation.dtype]
    m, n, k, group_size = shape_of(instantiation)
    p = make_product(bits, m, n, k, group_size, dtype)

    if instantiation.dtype == "fp16":  # the sums do not depend on the type
        layer = make_format(weight_bits=bits, group_size=group_size, in_features=k, out_features=n)
        sums = gpu.integer_sums(p.codes, p.planes, layer, instantiation.shape_class)
        assert np.array_equal(sums.numpy(), p.sums if group_size else p.sums[:, 0])

    y = torch.full((m, n), torch.nan, dtype=dtype)
    tiles = choose.num_tiles(m, n, instantiation.shape_class, choose.group_step(group_size))
    gpu.launch(
        instantiation,
        (tiles, 1, 1),
        *(p.codes, p.planes, p.act_scale, p.weight_scale, p.bias, p.addend, y, m, n),
        *(p.codes.shape[1], p.planes.shape[2], p.weight_scale.shape[1], 1, 1),
    )
    assert_as_exact_as_torch(y, p.expected, p.in_plain_torch)


@pytest.mark.parametrize("instantiation", PARTIALS, ids=lambda i: i.name)
def test_slices_add_up_to_reference(instantiation: Instantiation, gpu: ModuleType):
    bits, (m, n, k, _) = instantiation.constants["BITS"], shape_of(instantiation)
    p = make_product(bits, m, n, k, 0, torch.float32)
    partials = torch.full((2, m, n), -1, dtype=torch.int32)
    tiles = choose.num_tiles(m, n, instantiation.shape_class)

    gpu.launch(
        instantiation,
        (tiles, 2, 1),
        *(p.codes, p.planes, partials, m, n, p.codes.shape[1], p.planes.shape[2], 128),
    )

    assert np.array_equal(partials.sum(dim=0).numpy(), p.sums[:, 0])
    assert partials[1].any()


@pytest.mark.parametrize("instantiation", FINISHES, ids=lambda i: i.name)
@pytest.mark.parametrize("extras", [0, 1])
def test_finish_equals_reference(instantiation: Instantiation, extras: int, gpu: ModuleType):
    dtype, (m, n) = TORCH_TYPES[instantiation.dtype], (5, 300)
    p = make_product(3, m, n, 40, 0, dtype)
    sums = torch.from_numpy(p.sums[:, 0])
    partials = torch.stack([sums - 7, torch.full_like(sums, 3), torch.full_like(sums, 4)])
    y = torch.full((m, n), torch.nan, dtype=dtype)

    gpu.launch(
        instantiation,
        (choose.ceil_div(m, 4), choose.ceil_div(n, 256), 1),
        *(partials, p.act_scale, p.weight_scale, p.bias, p.addend, y, m, n, 3, extras, extras),
    )

    without = 0 if extras else p.bias.double().numpy() + p.addend.double().numpy()
    assert_as_exact_as_torch(y, p.expected - without, p.in_plain_torch - without)


@pytest.mark.parametrize(
    ("m", "k", "group_size", "dtype"),
    [
        (1, 1152, 0, "fp16"),
        (1, 40, 0, "fp32"),
        (7, 4608, 0, "fp16"),
        (17, 72, 0, "bf16"),
        (33, 1152, 0, "fp32"),
        (3, 1152, 128, "fp16"),
        (9, 1152, 96, "fp32"),
        (3, 4608, 1152, "fp16"),
    ],
)
@pytest.mark.parametrize("extras", [False, True])
def test_layer_equals_reference(
    m: int, k: int, group_size: int, dtype: str, extras: bool, gpu: ModuleType
):
    n, bits, type_ = 35, 3, TORCH_TYPES[dtype]
    rng = np.random.default_rng(m + k)
    x = torch.from_numpy(rng.standard_normal((1, m, k)).astype(np.float32)).to(type_)
    q_w = rng.integers(-4, 4, (n, k)).astype(np.int8)
    s_w = rng.uniform(0.01, 0.03, (n, k // group_size if group_size else 1)).astype(np.float32)
    bias = torch.from_numpy(rng.standard_normal(n).astype(np.float32)) if extras else None
    addend = torch.from_numpy(rng.standard_normal((1, m, n)).astype(np.float32)) if extras else None
    if addend is not None:
        addend = addend.to(type_)
    layer = make_format(
        act_bits=3,
        act_step=INTEGER.gaussian_step[3],
        rotation_group=8 if k < 128 else 128,
        group_size=group_size,
        in_features=k,
        out_features=n,
    )

    y = gpu.qlinear(
        x,
        torch.from_numpy(pack(q_w, bits)),
        torch.from_numpy(s_w),
        bias,
        addend,
        layer,
    )

    assert y.shape == (1, m, n)
    assert y.dtype == type_
    # Codes at a rounding tie may differ from float64's, so the kernel's own are the reference's.
    codes, scale = gpu.quantize_tokens(x[0], layer)
    q_x = deinterleave(codes.numpy())[:, :k]
    sums = numerics.accumulate(q_x, q_w, s_w.shape[1])
    expected = (sums * s_w.T.astype(np.float64)).sum(axis=1) * scale.double().numpy()[:, None]
    x_hat = torch.from_numpy(q_x * scale.numpy()[:, None]).to(type_)
    plain = x_hat @ torch.from_numpy(numerics.dequantize_weight(q_w, s_w)).to(type_).T
    if bias is not None and addend is not None:
        expected = expected + bias.double().numpy() + addend[0].double().numpy()
        plain = plain + bias.to(type_) + addend[0]
    assert_as_exact_as_torch(y[0], expected, plain.double().numpy())


@pytest.mark.parametrize("act_scale", ["token_rms", "token_absmax", "tensor_static"])
@pytest.mark.parametrize("rotation_group", [1, 4, 32])
def test_tokens_that_are_not_finite_behave_as_in_the_reference(
    act_scale: str, rotation_group: int, gpu: ModuleType
):
    n, k = 9, 64
    rng = np.random.default_rng(5)
    x = rng.standard_normal((6, k)).astype(np.float32)
    x[1, 3], x[2, 40], x[3, 9], x[4] = np.nan, np.inf, -np.inf, 0
    x[5, 1:3] = np.inf, -np.inf
    q_w = rng.integers(-4, 4, (n, k)).astype(np.int8)
    s_w = rng.uniform(0.01, 0.03, (n, 1)).astype(np.float32)
    activation = ActivationFormat.model_validate({"bits": 4, "scale": act_scale})
    step = numerics.activation_step(activation) or 0.4

    y = gpu.qlinear(
        torch.from_numpy(x),
        torch.from_numpy(pack(q_w, 3)),
        torch.from_numpy(s_w),
        None,
        None,
        make_format(
            act_scale=act_scale,
            act_step=step,
            rotation_group=rotation_group,
            in_features=k,
            out_features=n,
        ),
    )

    expected = numerics.qlinear(
        x.astype(np.float64),
        q_w,
        s_w,
        activation=activation,
        step=step,
        rotation_group=rotation_group,
    )
    assert np.array_equal(np.isnan(y.numpy()), np.isnan(expected))
    assert np.allclose(y.numpy(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert not y[4].any()


def test_no_tokens_give_no_rows(gpu: ModuleType):
    p = make_product(3, 4, 5, 40, 0, torch.float32)
    layer = make_format(in_features=40)
    codes, scale = gpu.quantize_tokens(torch.empty(0, 40), layer)
    y = gpu.product(codes, scale, p.planes, p.weight_scale, None, None, layer, torch.float16)
    assert codes.shape == (0, 128)
    assert scale.shape == (0,)
    assert y.shape == (0, 5)


def test_list_covers_the_promised_bits():
    names = {i.name for i in PRODUCTS}
    assert {f"qlinear_w{b}_{c}_fp16" for b in range(2, 9) for c in inst.SHAPE_CLASSES} <= names
    assert {f"qlinear_w{b}_g{g}_token_fp16" for b in (2, 3, 4, 8) for g in (32, 64, 128)} <= names
