"""Numbers as a reader sees them; one function per kind of quantity, used by terminal and HTML.

A value that was not measured (None) is a dash. Infinity is shown as it is: an SQNR of infinity is
a result (bit-exact), not an error. Sizes are decimal: 1 MB is 1e6 bytes.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

from treeq_export.records import ORT_CPU, Spread

DASH = "-"
INFINITY = "inf"
_LONGEST_WRITTEN = 9  # characters of a limit that somebody wrote; longer ones were computed


def name_with_runtime(target: str, runtime: str) -> str:
    """Return a target's name, with what ran it where that is not ONNX Runtime as such.

    >>> name_with_runtime("ort", "ONNX Runtime CPU")
    'ort'
    >>> name_with_runtime("tensorrt", "ONNX Runtime CPU (emulates the engine)")
    'tensorrt, ONNX Runtime CPU (emulates the engine)'
    """
    return target if runtime == ORT_CPU else f"{target}, {runtime}"


def format_number(value: float | None, digits: int = 4) -> str:
    """Return `value` with `digits` significant digits; integer digits are never dropped.

    >>> format_number(0.99987), format_number(123456.7), format_number(float("inf"))
    ('0.9999', '123457', 'inf')
    """
    if value is None:
        return DASH
    if math.isinf(value):
        return INFINITY if value > 0 else "-" + INFINITY
    if 10**digits <= abs(value) < 1e9:
        return f"{value:.0f}"
    return f"{value:.{digits}g}" if math.isfinite(value) else "nan"


def format_fixed(value: float | None, decimals: int = 2) -> str:
    """Return `value` with a fixed number of decimals.

    >>> format_fixed(4.0), format_fixed(13.87, 1)
    ('4.00', '13.9')
    """
    if value is None or not math.isfinite(value):
        return format_number(value)
    return f"{value:.{decimals}f}"


def format_db(value: float | None) -> str:
    """Return decibels with one decimal, without the unit.

    >>> format_db(13.87), format_db(float("inf"))
    ('13.9', 'inf')
    """
    return format_fixed(value, 1)


def format_percent(value: float | None, decimals: int = 1) -> str:
    """Return a fraction in percent, never rounded up to 100 or down to 0.

    >>> format_percent(0.975), format_percent(0.99996), format_percent(1.0)
    ('97.5 %', '99.996 %', '100.0 %')
    """
    if value is None or not math.isfinite(value):
        return format_number(value)
    percent = 100 * value
    for places in range(decimals, 8):
        text = f"{percent:.{places}f}"
        if float(text) not in (0.0, 100.0) or percent in (0.0, 100.0):
            return f"{text} %"
    return f"{percent!r} %"


def format_bytes(value: float | None) -> str:
    """Return a size with three significant digits in B, kB, MB or GB (powers of 1000).

    >>> format_bytes(8_412_345), format_bytes(512), format_bytes(999_999)
    ('8.41 MB', '512 B', '1 MB')
    """
    if value is None:
        return DASH
    rounded = float(f"{value:.3g}")
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(rounded) >= factor:
            return f"{rounded / factor:g} {unit}"
    return f"{value:.0f} B"


def format_count(value: int | None) -> str:
    """Return an integer with its thousands apart.

    >>> format_count(2_123_904)
    '2,123,904'
    """
    return DASH if value is None else f"{value:,}"


def format_ratio(value: float | None) -> str:
    """Return a ratio with three significant digits and an x.

    >>> format_ratio(7.638), format_ratio(0.8)
    ('7.64x', '0.80x')
    """
    if value is None or not math.isfinite(value):
        return format_number(value)
    decimals = 2 if abs(value) < 10 else 1
    return f"{value:.{decimals}f}x"


def format_seconds(value: float | None) -> str:
    """Return a duration in seconds, or minutes and seconds from two minutes on.

    >>> format_seconds(3.21), format_seconds(754.0)
    ('3.2 s', '12 min 34 s')
    """
    if value is None or not math.isfinite(value):
        return format_number(value)
    if value < 120:
        return f"{value:.1f} s"
    return f"{int(value // 60)} min {int(value % 60)} s"


def format_spread(spread: Spread | None, decimals: int) -> str:
    """Return mean and standard deviation over the seeds; of one seed its value.

    >>> format_spread(Spread(mean=0.3333, std=0.0879, values=[]), 3)
    '0.333 ± 0.088'
    """
    if spread is None:
        return DASH
    mean = format_fixed(spread.mean, decimals)
    return mean if spread.std is None else f"{mean} ± {format_fixed(spread.std, decimals)}"


def format_limit(limit: float) -> str:
    """Return a limit as it was written; one that was computed has four significant digits.

    >>> format_limit(40.0), format_limit(0.99995), format_limit(26.84889849857438)
    ('40', '0.99995', '26.85')
    """
    return _shorten(limit, 4 if len(repr(limit)) > _LONGEST_WRITTEN else 17)


def format_gate(measured: float, limit: float) -> tuple[str, str]:
    """Return a gate's value and limit with enough digits to see on which side the value lies.

    >>> format_gate(47.3149, 40.0), format_gate(39.9999999, 40.0)
    (('47.31', '40'), ('39.9999999', '40'))
    >>> format_gate(32.671, 26.84889849857438)
    ('32.67', '26.85')
    """
    side = (measured < limit, measured > limit)
    texts = _shorten(measured, 17), _shorten(limit, 17)
    for digits in range(4, 17):
        short = limit if len(repr(limit)) <= _LONGEST_WRITTEN else float(f"{limit:.{digits}g}")
        shown = float(f"{measured:.{digits}g}")
        rounded = math.isinf(short) == math.isinf(limit)  # else the largest floats became inf
        if rounded and (shown < short, shown > short) == side:
            return _shorten(shown, 17), _shorten(short, 17)
    return texts


def _shorten(value: float, digits: int) -> str:
    """Return a number in its shortest form of so many significant digits."""
    return repr(float(f"{value:.{digits}g}")).removesuffix(".0")


def format_bits(bits: int | None) -> str:
    """Return the bits of a format, "fp" where it is floating point.

    >>> format_bits(4), format_bits(None)
    ('4', 'fp')
    """
    return "fp" if bits is None else str(bits)


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested settings as (dotted name, text) pairs, in the order given.

    >>> flatten({"cpu": {"model": "x", "cores": 2}, "flags": ["a", "b"], "ram_bytes": 25279059648})
    [('cpu.model', 'x'), ('cpu.cores', '2'), ('flags', 'a, b'), ('ram_bytes', '25.3 GB')]
    """
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += flatten(cast("Mapping[str, Any]", value), f"{name}.")
        elif isinstance(value, list | tuple):
            rows.append((name, ", ".join(map(_format_setting, cast("list[Any]", value)))))
        elif key.endswith("_bytes") and isinstance(value, int):
            rows.append((name, format_bytes(value)))
        else:
            rows.append((name, _format_setting(value)))
    return rows


def _format_setting(value: Any) -> str:
    if value is None:
        return DASH
    return format_number(value) if isinstance(value, float) else str(value)
