import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treeq_export.records import Speedup
from treeq_export.report.quantities import (
    flatten,
    format_bits,
    format_bytes,
    format_count,
    format_db,
    format_fixed,
    format_gate,
    format_limit,
    format_number,
    format_percent,
    format_ratio,
    format_seconds,
)
from treeq_export.report.tiles import describe_speedup

FORMATS: list[Callable[..., str]] = [
    format_number,
    format_fixed,
    format_db,
    format_percent,
    format_ratio,
    format_seconds,
]


@pytest.mark.parametrize("format_value", FORMATS)
def test_what_is_no_number_is_said_so(format_value: Callable[..., str]) -> None:
    shown = [format_value(value) for value in (None, math.inf, -math.inf, math.nan)]
    assert shown == ["-", "inf", "-inf", "nan"]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (format_bytes(None), "-"),
        (format_count(None), "-"),
        (format_bits(None), "fp"),
        (format_bytes(0), "0 B"),
        (format_bytes(12_345_678_900), "12.3 GB"),
        (format_bytes(4_000_000_000_000), "4000 GB"),
        (format_number(40.0), "40"),
        (format_number(0.000012), "1.2e-05"),
        (format_number(-98765.4), "-98765"),
        (format_ratio(12.345), "12.3x"),
        (format_seconds(119.96), "120.0 s"),
        (format_seconds(3600.0), "60 min 0 s"),
        (format_percent(0.0), "0.0 %"),
        (format_percent(0.00001), "0.001 %"),
        (format_percent(0.999999999999), "99.9999999999 %"),
    ],
)
def test_shown_values(shown: str, expected: str) -> None:
    assert shown == expected


@given(st.floats(), st.floats(allow_nan=False))
def test_a_gate_is_shown_on_its_side_of_the_limit(measured: float, limit: float) -> None:
    shown, shown_limit = map(float, format_gate(measured, limit))
    assert shown_limit == pytest.approx(limit, rel=5e-4)
    assert (shown < shown_limit, shown > shown_limit) == (measured < limit, measured > limit)


@given(st.integers(0, 9999), st.integers(0, 4))
def test_a_limit_that_was_written_is_shown_exactly(number: int, decimals: int) -> None:
    limit = number / 10**decimals
    assert float(format_limit(limit)) == limit
    assert float(format_gate(1.0, limit)[1]) == limit


@given(st.integers(0, 10**15))
def test_sizes_are_within_half_a_percent(size: int) -> None:
    number, unit = format_bytes(size).split()
    factor = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
    assert float(number) * factor == pytest.approx(size, rel=0.005)


def test_flatten_keeps_order_and_shows_none_as_a_dash() -> None:
    nested: dict[str, Any] = {"b": {"x": None, "a": {"deep": 1}}, "a": [], "c": (1, 2)}
    assert flatten(nested) == [("b.x", "-"), ("b.a.deep", "1"), ("a", ""), ("c", "1, 2")]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.1, 1.3, "1.20x [1.10, 1.30]"),
        (0.9, 1.3, "1.20x [0.90, 1.30] no clear difference"),
        (0.8, 0.9, "1.20x [0.80, 0.90] slower"),
    ],
)
def test_a_speedup_says_when_it_is_none(low: float, high: float, expected: str) -> None:
    speedup = Speedup(target="t", baseline="b", batch=1, ratio=1.2, low=low, high=high)
    assert describe_speedup(speedup) == expected
