"""Where the Gaussian steps of the grid `integer` come from, and what they are worth."""

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize_scalar

from treeq_export.ops import ActScale
from treeq_export.quant.grids import INTEGER
from treeq_export.quant.metrics import sqnr_db
from treeq_export.quant.numerics import (
    activation_scale,
    activation_step,
    quantize_activation,
)
from treeq_export.quant.spec import ActivationFormat

NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(12)


def density(t: np.ndarray | float) -> np.ndarray:
    return np.exp(-0.5 * np.square(t)) / math.sqrt(2 * math.pi)


def mean_squared_error(step: float, bits: int) -> float:
    """Of a unit Gaussian rounded to step * {-2^(bits-1), ..., 2^(bits-1) - 1}."""
    codes = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    inner = codes[1:-1, None] * step + 0.5 * step * NODES
    bounded = np.sum(
        0.5 * step * NODE_WEIGHTS * np.square(inner - codes[1:-1, None] * step) * density(inner)
    )
    lowest, highest = codes[0] * step, codes[-1] * step
    below, _ = quad(lambda t: (t - lowest) ** 2 * density(t), -math.inf, lowest + step / 2)
    above, _ = quad(lambda t: (t - highest) ** 2 * density(t), highest - step / 2, math.inf)
    return float(bounded + below + above)


def best_step(bits: int) -> tuple[float, float]:
    result = minimize_scalar(
        mean_squared_error,
        bounds=(1 / 2**bits, 10 / 2**bits),
        args=(bits,),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return float(result.x), float(result.fun)


@pytest.mark.parametrize("bits", range(2, 9))
def test_step_minimises_the_squared_error_of_a_unit_gaussian(bits: int):
    step, _ = best_step(bits)
    assert INTEGER.gaussian_step[bits] == pytest.approx(step, abs=1e-5)


def test_there_is_one_step_per_width():
    assert list(INTEGER.gaussian_step) == [2, 3, 4, 5, 6, 7, 8]


def measured_sqnr_db(bits: int, scale: ActScale) -> float:
    """Over 500 tokens of 1152 Gaussian values."""
    x = 1.7 * np.random.default_rng(0).standard_normal((500, 1152))
    step = activation_step(ActivationFormat(bits=bits, scale=scale))
    assert step is not None
    s_x = activation_scale(x, scale, step)
    return sqnr_db(x, quantize_activation(x, s_x, bits) * s_x)


def test_sigma_step_reaches_13_9_db_at_3_bits():
    _, error = best_step(3)
    assert -10 * math.log10(error) == pytest.approx(13.9, abs=0.05)
    assert measured_sqnr_db(3, "token_rms") == pytest.approx(13.9, abs=0.05)


def test_absmax_is_far_worse_at_3_bits():
    assert 8.5 < measured_sqnr_db(3, "token_absmax") < 10.5


def test_absmax_wins_at_8_bits():
    assert measured_sqnr_db(8, "token_absmax") > measured_sqnr_db(8, "token_rms")


@pytest.mark.parametrize("bits", range(2, 9))
def test_activation_step(bits: int):
    assert (
        activation_step(ActivationFormat(bits=bits, scale="token_rms"))
        == INTEGER.gaussian_step[bits]
    )
    absmax = activation_step(ActivationFormat(bits=bits, scale="token_absmax"))
    assert absmax == 1 / (2 ** (bits - 1) - 1)
    assert activation_step(ActivationFormat(bits=bits, scale="tensor_static")) is None
    assert INTEGER.ends(bits) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def test_no_step_where_nothing_is_quantized():
    assert activation_step(ActivationFormat(bits=None, scale="none")) is None
