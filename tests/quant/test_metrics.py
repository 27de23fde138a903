import math

import numpy as np
import pytest

from treeq_export.quant.metrics import equal_code_fraction, max_abs_error, psnr_db, sqnr_db

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("x", "x_hat", "expected"),
    [
        ([3.0, 4.0], [3.0, 4.0], INF),
        ([0.0, 0.0], [0.0, 0.0], INF),
        ([], [], INF),
        ([0.0, 0.0], [0.0, 1.0], -INF),
        ([1.0], [0.0], 0.0),
        ([1.0], [3.0], 20 * math.log10(0.5)),
        ([10.0, 0.0], [10.0, 1.0], 20.0),
        ([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.1], [0.1, 1.0]], 20.0),
        ([1.0, NAN], [1.0, 1.0], NAN),
        ([1.0, 1.0], [1.0, NAN], NAN),
        ([1.0, 1.0], [1.0, INF], NAN),
        ([INF, 1.0], [INF, 1.0], NAN),
    ],
)
def test_sqnr_db(x: list[float], x_hat: list[float], expected: float):
    assert sqnr_db(x, x_hat) == pytest.approx(expected, nan_ok=True)


def test_sqnr_sums_in_float64():
    x = np.full(100_000, 300.0, dtype=np.float16)
    assert sqnr_db(x, x * np.float16(1.5)) == pytest.approx(20 * math.log10(2))


@pytest.mark.parametrize(
    ("x", "x_hat", "expected"),
    [
        ([1.0, -2.0], [1.0, -2.0], 0.0),
        ([1.0, -2.0], [1.5, -5.0], 3.0),
        ([], [], 0.0),
        ([0.0, 0.0], [0.0, -7.0], 7.0),
        ([0.0, NAN], [9.0, 0.0], NAN),
        ([0.0, 1.0], [9.0, NAN], NAN),
        ([0.0], [INF], INF),
        ([INF, 0.0], [INF, 0.0], NAN),
    ],
)
def test_max_abs_error(x: list[float], x_hat: list[float], expected: float):
    assert max_abs_error(x, x_hat) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("codes", "codes_hat", "expected"),
    [([], [], 1.0), ([1, 2], [1, 2], 1.0), ([1, 2], [2, 1], 0.0), ([[1], [2]], [[1], [3]], 0.5)],
)
def test_equal_code_fraction(codes: list[int], codes_hat: list[int], expected: float):
    found = equal_code_fraction(np.array(codes, dtype=np.int8), np.array(codes_hat, dtype=np.int32))
    assert found == expected


@pytest.mark.parametrize(
    ("x", "x_hat", "data_range", "expected"),
    [
        ([1.0], [1.0], 2.0, INF),
        ([], [], 2.0, INF),
        ([0.0, 0.0], [0.2, -0.2], 2.0, 20.0),
        ([0.0, 0.0, 0.0, 0.0], [0.2, 0.0, 0.0, 0.0], 2.0, 20 * math.log10(20)),
        ([0.0], [2.0], 2.0, 0.0),
        ([0.0, NAN], [0.0, 0.0], 2.0, NAN),
        ([0.0], [INF], 2.0, NAN),
        ([INF], [INF], 2.0, NAN),
    ],
)
def test_psnr_db(x: list[float], x_hat: list[float], data_range: float, expected: float):
    assert psnr_db(x, x_hat, data_range) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("measure", [sqnr_db, max_abs_error])
def test_python_floats_come_back(measure):
    x = np.ones(4, dtype=np.float32)
    assert type(measure(x, 2 * x)) is float
    assert type(psnr_db(x, 2 * x, 1.0)) is float
    assert type(equal_code_fraction(x, x)) is float
