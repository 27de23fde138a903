import numpy as np
import pytest

from treeq_export.quant import scales
from treeq_export.quant.grids import INTEGER
from treeq_export.quant.numerics import (
    SCALE_FLOOR,
    dequantize_weight,
    quantize_weight,
)
from treeq_export.quant.scales import LEAST_CLIP, clip_ratios, fit_tensor_scale, fit_weight_scale


def squared_error(weight: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """Per row and group."""
    back = dequantize_weight(quantize_weight(weight, scale, bits), scale)
    error = np.square(weight - back).astype(np.float64)
    return error.reshape(*scale.shape, -1).sum(axis=-1)


def weights(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 96))
    if kind == "heavy":
        x = rng.standard_t(2, (6, 96))
    if kind == "one_outlier":
        x[:, 7] = 50.0
    if kind == "uniform":
        x = rng.uniform(-1, 1, (6, 96))
    return x.astype(np.float32)


@pytest.mark.parametrize("kind", ["gauss", "heavy", "one_outlier", "uniform"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("num_steps", [1, 2, 30])
def test_never_worse_than_absmax(kind: str, bits: int, group_size: int | None, num_steps: int):
    weight = weights(kind)
    grouped = np.abs(weight).reshape(6, -1, group_size or 96)
    absmax = grouped.max(axis=-1) / np.float32(INTEGER.ends(bits)[1])
    scale = fit_weight_scale(weight, bits, group_size, num_steps)
    assert scale.shape == absmax.shape
    assert scale.dtype == np.float32
    assert np.all(squared_error(weight, scale, bits) <= squared_error(weight, absmax, bits))


def test_a_single_step_is_absmax():
    weight = weights("gauss")
    expected = np.abs(weight).max(axis=1, keepdims=True) / np.float32(7)
    np.testing.assert_allclose(fit_weight_scale(weight, 4, None, 1), expected, rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clipping_pays_at_few_bits(bits: int):
    weight = np.random.default_rng(1).standard_normal((8, 1152)).astype(np.float32)
    scale = fit_weight_scale(weight, bits, None, 80)
    np.testing.assert_allclose(scale, INTEGER.gaussian_step[bits], rtol=0.12)


def test_the_best_of_the_grid_is_found():
    weight = weights("heavy")
    scale = fit_weight_scale(weight, 3, None, 25)
    full = np.abs(weight).max(axis=1, keepdims=True) / np.float32(3)
    errors = np.stack([squared_error(weight, full * r, 3) for r in clip_ratios(25)])
    np.testing.assert_allclose(squared_error(weight, scale, 3), errors.min(axis=0), rtol=1e-5)


def test_each_group_is_fitted_alone():
    weight = weights("gauss")
    together = fit_weight_scale(weight, 4, 24, 20)
    assert together.shape == (6, 4)
    for g in range(4):
        alone = fit_weight_scale(weight[:, g * 24 : (g + 1) * 24], 4, None, 20)
        assert np.array_equal(together[:, [g]], alone)


def test_rows_of_zeros_get_the_floor():
    weight = weights("gauss")
    weight[2] = 0
    scale = fit_weight_scale(weight, 4, None, 20)
    assert scale[2, 0] == np.float32(SCALE_FLOOR)
    assert np.all(scale[[0, 1, 3, 4, 5]] > 0.01)
    assert not quantize_weight(weight, scale, 4)[2].any()


@pytest.mark.parametrize("chunk", [1, 96, 97, 300])
def test_chunks_do_not_change_the_result(chunk: int, monkeypatch: pytest.MonkeyPatch):
    weight = weights("heavy")
    whole = fit_weight_scale(weight, 3, 32, 15)
    monkeypatch.setattr(scales, "_CHUNK", chunk)
    assert np.array_equal(fit_weight_scale(weight, 3, 32, 15), whole)


def test_float64_weights_give_float32_scales():
    weight = weights("gauss")
    scale = fit_weight_scale(weight.astype(np.float64), 4, None, 10)
    assert np.array_equal(scale, fit_weight_scale(weight, 4, None, 10))


def test_tensor_scale_is_one_scale_for_all_values():
    values = weights("heavy").reshape(2, 3, 96)
    scale = fit_tensor_scale(values, 4, 30)
    assert isinstance(scale, float)
    assert scale == fit_weight_scale(values.reshape(1, -1), 4, None, 30).item()


def test_clip_ratios():
    assert clip_ratios(1).tolist() == [1.0]
    assert clip_ratios(4).tolist() == [0.25, 0.5, 0.75, 1.0]
    ratios = clip_ratios(40)
    assert len(ratios) == 40
    assert (ratios[0], ratios[-1]) == (LEAST_CLIP, 1.0)
    assert np.all(np.diff(ratios) > 0)
