"""The reference arithmetic against properties and against its formula written out in loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from treeq_export.ops import ActScale
from treeq_export.quant.grids import INTEGER
from treeq_export.quant.numerics import (
    SCALE_FLOOR,
    accumulate,
    activation_scale,
    activation_step,
    dequantize_output,
    dequantize_weight,
    qlinear,
    quantize_activation,
    quantize_weight,
)
from treeq_export.quant.spec import ActivationFormat

BITS = st.integers(2, 8)
SCALES = st.floats(1e-6, 1e3)
TOKEN_SCALES: list[ActScale] = ["token_rms", "token_absmax"]
ALL_SCALES: list[ActScale] = [*TOKEN_SCALES, "tensor_static"]


def step_of(bits: int, scale: ActScale) -> float:
    step = activation_step(ActivationFormat(bits=bits, scale=scale))
    return 0.11 if step is None else step


# Quantizers -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(bits=BITS, scale=SCALES, data=st.data())
def test_activation_error_is_half_a_step_inside_the_range(
    bits: int, scale: float, data: st.DataObject
):
    qmin, qmax = INTEGER.ends(bits)
    inside = st.floats(qmin * scale, qmax * scale)
    x = data.draw(hnp.arrays(np.float64, (3, 5), elements=inside))
    codes = quantize_activation(x, np.full((3, 1), scale), bits)
    assert codes.dtype == np.int8
    assert np.abs(codes * scale - x).max() <= scale * (0.5 + 1e-9)


@settings(deadline=None)
@given(bits=BITS, scale=SCALES, factor=st.floats(1.0, 1e6))
def test_activations_outside_the_range_saturate(bits: int, scale: float, factor: float):
    qmin, qmax = INTEGER.ends(bits)
    x = np.array([[qmin * factor, qmax * factor]]) * scale
    assert quantize_activation(x, np.array([[scale]]), bits).tolist() == [[qmin, qmax]]


@settings(deadline=None)
@given(bits=BITS, groups=st.sampled_from([1, 2, 4]), data=st.data())
def test_weight_error_is_half_a_step_inside_the_range(bits: int, groups: int, data: st.DataObject):
    qmin, qmax = INTEGER.ends(bits)
    scale = data.draw(hnp.arrays(np.float64, (3, groups), elements=SCALES))
    unit = data.draw(hnp.arrays(np.float64, (3, 8), elements=st.floats(qmin, qmax)))
    per_weight = np.repeat(scale, 8 // groups, axis=1)
    weight = unit * per_weight
    codes = quantize_weight(weight, scale, bits)
    assert codes.dtype == np.int8
    assert codes.min() >= qmin
    assert codes.max() <= qmax
    error = np.abs(dequantize_weight(codes, scale) - weight)
    assert np.all(error <= per_weight * (0.5 + 1e-9))


@settings(deadline=None)
@given(bits=BITS, data=st.data())
def test_codes_on_the_grid_come_back(bits: int, data: st.DataObject):
    qmin, qmax = INTEGER.ends(bits)
    codes = data.draw(hnp.arrays(np.int8, (4, 6), elements=st.integers(qmin, qmax)))
    scale = data.draw(hnp.arrays(np.float32, (4, 2), elements=st.floats(0.25, 4.0, width=32)))
    assert np.array_equal(quantize_weight(dequantize_weight(codes, scale), scale, bits), codes)


@pytest.mark.parametrize("quantize", ["activation", "weight"])
def test_halves_round_to_even(quantize: str):
    halves = np.array([[0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, -3.5]], dtype=np.float32)
    one = np.ones((1, 1), dtype=np.float32)
    function = quantize_activation if quantize == "activation" else quantize_weight
    assert function(halves, one, 8).tolist() == [[0, 2, 2, 4, 0, -2, -2, -4]]


def test_activations_are_multiplied_by_the_reciprocal():
    # 1.3 has no exact float32, so the quotient and the product fall on different sides of 3.5.
    scale = np.full((1, 1), 1.3, dtype=np.float32)
    x = np.float32(3.5) * scale
    assert np.rint(x / scale).item() == 4
    assert np.rint(x * (np.float32(1) / scale)).item() == 3
    assert quantize_activation(x, scale, 8).item() == 3
    assert quantize_weight(x, scale, 8).item() == 4


# Scales -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_activation_scales_are_their_formulas(dtype: type[np.floating]):
    x = np.array([[[3.0, -4.0, 0.0, 0.0], [1.0, 1.0, -1.0, 1.0]]], dtype=dtype)
    expected = {"token_rms": [1.25, 0.5], "token_absmax": [2.0, 0.5], "tensor_static": [0.5, 0.5]}
    for kind in ALL_SCALES:
        scale = activation_scale(x, kind, 0.5)
        assert scale.dtype == dtype
        assert scale.shape == (1, 2, 1)
        assert scale.ravel().tolist() == expected[kind]


@pytest.mark.parametrize("kind", TOKEN_SCALES)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-38])
def test_scale_has_a_floor(kind: ActScale, size: float):
    x = np.full((2, 8), size, dtype=np.float32)
    scale = activation_scale(x, kind, 0.1)
    assert scale.tolist() == [[np.float32(SCALE_FLOOR)]] * 2
    assert not quantize_activation(x, scale, 4).any()


def test_every_activation_scale_of_the_format_is_covered_here():
    assert {*ALL_SCALES, "none"} == set(ActScale)


# Integer products -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(
    leading=st.sampled_from([(), (3,), (2, 3)]),
    n=st.integers(1, 4),
    groups=st.sampled_from([1, 2, 5]),
    size=st.integers(1, 12),
    data=st.data(),
)
def test_accumulate_is_the_int64_product(
    leading: tuple[int, ...], n: int, groups: int, size: int, data: st.DataObject
):
    q_x = data.draw(hnp.arrays(np.int8, (*leading, groups * size)))
    q_w = data.draw(hnp.arrays(np.int8, (n, groups * size)))
    found = accumulate(q_x, q_w, groups)
    assert found.dtype == np.int32
    assert found.shape == (*leading, groups, n)
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        expected = q_x[..., part].astype(np.int64) @ q_w[:, part].astype(np.int64).T
        assert np.array_equal(found[..., g, :], expected)


def test_accumulate_is_exact_at_its_largest():
    k = 4608
    lowest = np.full((2, k), -128, dtype=np.int8)
    assert accumulate(lowest, lowest).ravel().tolist() == [k << 14] * 4
    rng = np.random.default_rng(0)
    q_x = rng.integers(96, 128, (16, k)).astype(np.int8)
    q_w = rng.integers(96, 128, (64, k)).astype(np.int8)
    exact = q_x.astype(np.int64) @ q_w.astype(np.int64).T
    assert exact.min() > 1 << 25
    assert np.array_equal(accumulate(q_x, q_w)[:, 0], exact)


def test_dequantize_output_adds_the_scaled_groups():
    sums = np.array([[[2, 3], [10, 100]]], dtype=np.int32)  # one token, two groups, two channels
    weight_scale = np.array([[0.5, 0.25], [2.0, 4.0]], dtype=np.float32)
    y = dequantize_output(sums, weight_scale, np.array([[3.0]], dtype=np.float32))
    assert y.dtype == np.float32
    assert y.tolist() == [[3 * (2 * 0.5 + 10 * 0.25), 3 * (3 * 2.0 + 100 * 4.0)]]


# The whole linear -------------------------------------------------------------------------------


def rotated_by_loops(token: list[float], group: int) -> list[float]:
    """H[i, j] = (-1)^popcount(i & j) / sqrt(group), written out."""
    out: list[float] = []
    for start in range(0, len(token), group):
        for j in range(group):
            signed = [token[start + i] * (-1) ** bin(i & j).count("1") for i in range(group)]
            out.append(sum(signed) / group**0.5)
    return out


def qlinear_by_loops(
    x: np.ndarray,
    codes: np.ndarray,
    weight_scale: np.ndarray,
    bias: np.ndarray | None,
    activation: ActivationFormat,
    step: float | None,
    rotation_group: int,
) -> list[list[float]]:
    n, k = codes.shape
    size = k // weight_scale.shape[1]
    out = []
    for token in x.tolist():
        t = rotated_by_loops(token, rotation_group)
        if activation.bits is None or step is None:
            s_x, q_x = 1.0, t
        else:
            s_x = step
            if activation.scale == "token_rms":
                s_x *= (sum(v * v for v in t) / k) ** 0.5
            elif activation.scale == "token_absmax":
                s_x *= max(abs(v) for v in t)
            half = 2 ** (activation.bits - 1)
            q_x = [min(max(round(v / s_x), -half), half - 1) for v in t]
        row = []
        for j in range(n):
            y = sum(q_x[i] * int(codes[j, i]) * float(weight_scale[j, i // size]) for i in range(k))
            row.append(y * s_x + (0.0 if bias is None else float(bias[j])))
        out.append(row)
    return out


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("bits", "scale", "k", "n", "groups", "rotation_group"),
    [
        (2, "token_rms", 8, 3, 1, 8),
        (3, "token_rms", 24, 5, 3, 4),
        (4, "token_absmax", 32, 4, 2, 32),
        (5, "tensor_static", 12, 7, 4, 2),
        (6, "token_rms", 40, 2, 5, 1),
        (8, "token_absmax", 64, 3, 1, 16),
        (None, "none", 32, 4, 2, 32),
        (None, "none", 10, 3, 1, 1),
    ],
)
def test_qlinear_is_its_formula(
    bits: int | None,
    scale: ActScale,
    k: int,
    n: int,
    groups: int,
    rotation_group: int,
    with_bias: bool,
):
    rng = np.random.default_rng(k)
    x = rng.standard_normal((5, k))
    codes = rng.integers(-8, 8, (n, k), dtype=np.int8)
    weight_scale = rng.uniform(0.01, 0.1, (n, groups))
    bias = rng.standard_normal(n) if with_bias else None
    activation = ActivationFormat(bits=bits, scale=scale)
    step = None if bits is None else step_of(bits, scale)
    y = qlinear(
        x,
        codes,
        weight_scale,
        activation=activation,
        step=step,
        rotation_group=rotation_group,
        bias=bias,
    )
    expected = qlinear_by_loops(x, codes, weight_scale, bias, activation, step, rotation_group)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-13)


def call_qlinear(x: np.ndarray, scale: ActScale, rotation_group: int = 1) -> np.ndarray:
    codes = np.random.default_rng(1).integers(-8, 8, (3, x.shape[-1]), dtype=np.int8)
    return qlinear(
        x,
        codes,
        np.full((3, 1), 0.1, dtype=np.float32),
        activation=ActivationFormat(bits=4, scale=scale),
        step=step_of(4, scale),
        rotation_group=rotation_group,
    )


@pytest.mark.parametrize("scale", ALL_SCALES)
def test_a_token_of_zeros_gives_zeros(scale: ActScale):
    x = np.ones((2, 3, 16), dtype=np.float32)
    x[1, 2] = 0
    y = call_qlinear(x, scale, rotation_group=8)
    assert y.dtype == np.float32
    assert y.shape == (2, 3, 3)
    assert not y[1, 2].any()
    assert y[0].any()


@pytest.mark.parametrize("scale", TOKEN_SCALES)
@pytest.mark.parametrize("rotation_group", [1, 16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_token_gives_nan_in_its_own_row_only(
    scale: ActScale, rotation_group: int, bad: float
):
    x = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    clean = call_qlinear(x, scale, rotation_group)
    x[2, 5] = bad
    y = call_qlinear(x, scale, rotation_group)
    assert np.isnan(y[2]).all()
    others = [0, 1, 3]
    assert np.array_equal(y[others], clean[others])


def test_nan_has_the_code_zero():
    x = np.array([[np.nan, 1.0, np.inf, -np.inf]], dtype=np.float32)
    codes = quantize_activation(x, np.ones((1, 1), dtype=np.float32), 4)
    assert codes.tolist() == [[0, 1, 7, -8]]
    nan_scale = np.full((1, 1), np.nan, dtype=np.float32)
    assert quantize_activation(x, nan_scale, 4).tolist() == [[0, 0, 0, 0]]
    inf_scale = np.full((1, 1), np.inf, dtype=np.float32)
    assert quantize_activation(x, inf_scale, 4).tolist() == [[0, 0, 0, 0]]


def test_largest_float32_token_becomes_nan_quietly():
    x = np.full((1, 16), np.finfo(np.float32).max)
    assert np.isnan(call_qlinear(x, "token_rms")).all()
    assert np.isfinite(call_qlinear(x * np.float32(1e-20), "token_rms")).all()
