"""The arithmetic of a load test: percentiles, Triton's counters, growth of memory."""

from collections.abc import Mapping, Sequence

import numpy as np

from treeq_export.client.answers import Statistics
from treeq_export.records.loadtest import ModelLoad

PERCENTILES = (50, 90, 95, 99)
_NS_PER_MS = 1e6
_MIN_QUARTERS = 4  # samples
_COUNTERS = ("inference_count", "execution_count")
_DURATIONS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")


def latency_percentiles(latencies_ms: Sequence[float]) -> dict[str, float | None]:
    """Return p50, p90, p95, p99 and the largest latency by their names in the record.

    Args:
        latencies_ms: In any order; may be empty.

    Example:
        >>> latency_percentiles([1.0, 2.0, 3.0, 4.0, 5.0])["p90_ms"]
        4.6
    """
    names = [*(f"p{percent}_ms" for percent in PERCENTILES), "max_ms"]
    if not latencies_ms:
        return dict.fromkeys(names)
    values = np.percentile(np.asarray(latencies_ms, np.float64), [*PERCENTILES, 100])
    return {name: round(float(value), 4) for name, value in zip(names, values, strict=True)}


def sum_counters(statistics: Statistics) -> dict[str, int]:
    """Return a model's counters over all its versions, flat.

    Args:
        statistics: JSON form of Triton's statistics extension.

    Returns:
        "inference_count", "execution_count", and "<duration>.count" and "<duration>.ns" of success,
        fail, queue, compute_input, compute_infer, compute_output.
    """
    totals = dict.fromkeys(_COUNTERS, 0)
    totals |= {f"{name}.{part}": 0 for name in _DURATIONS for part in ("count", "ns")}
    for version in statistics.get("model_stats", []):
        for name in _COUNTERS:
            totals[name] += version.get(name, 0)
        for name in _DURATIONS:
            duration = version.get("inference_stats", {}).get(name, {})
            for part in ("count", "ns"):
                totals[f"{name}.{part}"] += duration.get(part, 0)
    return totals


def subtract_counters(
    name: str, before: Mapping[str, int], after: Mapping[str, int]
) -> ModelLoad | None:
    """Return what a model did between two readings of its counters.

    Args:
        name: The model.
        before: From `sum_counters`.
        after: Later counters, from `sum_counters`.

    Returns:
        The model's part of the load; None where a counter went down: a version was unloaded.
    """
    delta = {key: after[key] - before[key] for key in before}
    if min(delta.values()) < 0:
        return None

    def mean_ms(*durations: str) -> float | None:
        count = delta["success.count"]
        total_ns = sum(delta[f"{duration}.ns"] for duration in durations)
        return round(total_ns / count / _NS_PER_MS, 4) if count else None

    executions = delta["execution_count"]
    return ModelLoad(
        name=name,
        num_requests=delta["success.count"],
        num_failed=delta["fail.count"],
        num_inferences=delta["inference_count"],
        num_executions=executions,
        average_batch=round(delta["inference_count"] / executions, 4) if executions else None,
        total_ms=mean_ms("success"),
        queue_ms=mean_ms("queue"),
        compute_ms=mean_ms("compute_input", "compute_infer", "compute_output"),
    )


def slope_mb_per_min(seconds: Sequence[float], sizes: Sequence[float]) -> float | None:
    """Return the slope of a least-squares line through the second half of the time.

    Args:
        seconds: When the samples were taken, ascending.
        sizes: Bytes.

    Returns:
        1e6 bytes per minute; None with fewer than two samples in that half.

    Example:
        >>> slope_mb_per_min([0, 1, 2, 3, 4], [9e6, 9e6, 1e6, 2e6, 3e6])
        60.0
    """
    times, values = np.asarray(seconds, np.float64), np.asarray(sizes, np.float64)
    if len(times) < 2:
        return None
    late = times >= (times[0] + times[-1]) / 2
    times, values = times[late], values[late]
    if len(times) < 2:
        return None
    centred = times - times.mean()
    per_second = float(centred @ (values - values.mean()) / (centred @ centred))
    return round(per_second * 60 / 1e6, 4)


def quarter_growth(sizes: Sequence[float]) -> tuple[float, float] | None:
    """Return how much the last quarter's median exceeds the first's: bytes, and their fraction.

    Args:
        sizes: Bytes, in order of time; the middle half is not looked at.

    Returns:
        None with fewer than four samples.

    Example:
        >>> quarter_growth([100, 104, 0, 0, 0, 0, 110, 114])
        (10.0, 0.09803921568627451)
    """
    quarter = len(sizes) // _MIN_QUARTERS
    if not quarter:
        return None
    first = float(np.median(sizes[:quarter]))
    growth = float(np.median(sizes[-quarter:])) - first
    return growth, growth / first if first else 0.0
