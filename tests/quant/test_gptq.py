"""GPTQ rounding: against exhaustive search, its block form against the loop, what it gains."""

import itertools

import numpy as np
import pytest

from treeq_export.quant import gptq
from treeq_export.quant.gptq import (
    inverse_factor,
    quantize_weight_gptq,
    refit_weight,
    second_moment,
)
from treeq_export.quant.grids import INTEGER
from treeq_export.quant.numerics import dequantize_weight, quantize_weight
from treeq_export.quant.scales import fit_weight_scale


def make_case(n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return a Gaussian weight (n, k) and strongly correlated tokens (4 k, k)."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(k, k)) * np.geomspace(1, 0.05, k)[:, None]
    tokens = generator.normal(size=(4 * k, k)) @ mixing
    return generator.normal(size=(n, k)).astype(np.float32), tokens.astype(np.float32)


def output_error(weight: np.ndarray, codes: np.ndarray, scale: np.ndarray, h: np.ndarray) -> float:
    difference = weight.astype(np.float64) - dequantize_weight(codes, scale)
    return float(np.einsum("nk,kl,nl->", difference, h, difference))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 16])
def test_output_error_is_below_rounding_to_nearest(bits: int, group_size: int | None):
    weight, tokens = make_case(24, 64)
    h = second_moment(tokens)
    scale = fit_weight_scale(weight, bits, group_size, 40)
    codes = quantize_weight_gptq(weight, scale, bits, inverse_factor(h))
    assert codes.dtype == np.int8
    qmin, qmax = INTEGER.ends(bits)
    assert codes.min() >= qmin
    assert codes.max() <= qmax
    nearest = output_error(weight, quantize_weight(weight, scale, bits), scale, h)
    assert output_error(weight, codes, scale, h) < 0.8 * nearest


def test_uncorrelated_inputs_give_rounding_to_nearest():
    weight, _ = make_case(8, 32)
    scale = fit_weight_scale(weight, 4, None, 40)
    codes = quantize_weight_gptq(weight, scale, 4, inverse_factor(np.eye(32)))
    assert np.array_equal(codes, quantize_weight(weight, scale, 4))


def test_it_comes_close_to_the_best_of_all_codes():
    weight, tokens = make_case(3, 5, seed=1)
    h = second_moment(tokens)
    scale = fit_weight_scale(weight, 2, None, 40)
    codes = quantize_weight_gptq(weight, scale, 2, inverse_factor(h))
    grid = np.array(list(itertools.product(range(-2, 2), repeat=5)), dtype=np.int8)
    for row in range(3):
        errors = [
            output_error(weight[row : row + 1], c[None], scale[row : row + 1], h) for c in grid
        ]
        mine = output_error(weight[row : row + 1], codes[row : row + 1], scale[row : row + 1], h)
        rank = int(np.sum(np.array(errors) < mine - 1e-12))
        assert rank <= 0.02 * len(grid)


def test_the_block_form_equals_the_plain_loop(monkeypatch: pytest.MonkeyPatch):
    weight, tokens = make_case(16, 48)
    h = second_moment(tokens)
    scale = fit_weight_scale(weight, 3, None, 40)
    whole = quantize_weight_gptq(weight, scale, 3, inverse_factor(h))
    monkeypatch.setattr(gptq, "_BLOCK", 7)
    assert np.array_equal(quantize_weight_gptq(weight, scale, 3, inverse_factor(h)), whole)


def test_inputs_that_are_all_zero_round_to_nearest():
    weight, _ = make_case(4, 16)
    scale = fit_weight_scale(weight, 3, None, 40)
    codes = quantize_weight_gptq(weight, scale, 3, inverse_factor(second_moment(np.zeros((8, 16)))))
    assert np.array_equal(codes, quantize_weight(weight, scale, 3))


def test_the_refitted_weight_is_the_least_squares_one():
    weight, tokens = make_case(6, 16)
    rng = np.random.default_rng(1)
    met = (0.9 * tokens + 0.2 * rng.standard_normal(tokens.shape)).astype(np.float32)
    target = tokens @ weight.T
    undamped = met.T.astype(np.float64) @ met / len(met)
    refitted = refit_weight(weight, met, target, undamped)
    exact = np.linalg.lstsq(met.astype(np.float64), target.astype(np.float64), rcond=None)[0].T
    assert np.allclose(refitted, exact, atol=1e-3)
    damped = refit_weight(weight, met, target, undamped + 1e6 * np.eye(16))
    assert np.allclose(damped, weight, atol=1e-3)
    assert np.allclose(
        refit_weight(weight, tokens, target, second_moment(tokens)), weight, atol=1e-5
    )


def test_a_weight_without_tokens_is_left_as_it_is():
    weight, _ = make_case(6, 16)
    nothing = np.empty((0, 16), dtype=np.float32)
    target = np.empty((0, 6), dtype=np.float32)
    assert np.array_equal(refit_weight(weight, nothing, target, second_moment(nothing)), weight)
