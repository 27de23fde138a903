"""Timing several callables fairly, and comparing the times.

- A round runs every callable once. The orders of successive rounds form a Williams design: over a
  full cycle each callable follows each other one equally often, so none always inherits the same
  neighbour's caches and clock.
- Before a turn the process is given time to become idle, because thread pools spin for a while
  after their last task and would take the cores from the next runtime. One uncounted call then
  brings the weights back into the caches, as in a sampling loop, and the next call is timed.
- Garbage collection is off while times are taken.

Source of the design: Williams, Experimental designs balanced for the estimation of residual effects
of treatments, 1949.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
NUM_RESAMPLES = 9999
_IDLE_WINDOW_S = 0.002
_IDLE_LIMIT_S = 0.5


def round_order(num: int, index: int) -> list[int]:
    """Return the order of `num` callables in round `index`.

    >>> [round_order(4, index) for index in range(4)]
    [[0, 1, 3, 2], [1, 2, 0, 3], [2, 3, 1, 0], [3, 0, 2, 1]]
    """
    zigzag = [(step + 1) // 2 if step % 2 else -step // 2 for step in range(num)]
    order = [(place + index) % num for place in zigzag]
    # An odd number needs the mirrored rows as well to be balanced.
    return order[::-1] if num % 2 and (index // num) % 2 else order


def wait_until_idle(limit_s: float = _IDLE_LIMIT_S) -> bool:
    """Sleep until no thread of this process is busy.

    Args:
        limit_s: Longest wait.

    Returns:
        Whether the process became idle within the limit.
    """
    deadline = time.perf_counter() + limit_s
    while time.perf_counter() < deadline:
        busy = time.process_time()
        time.sleep(_IDLE_WINDOW_S)
        if time.process_time() - busy < _IDLE_WINDOW_S / 4:
            return True
    return False


def time_rounds(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    on_turn: Callable[[], None],
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, list[float]]:
    """Time callables in interleaved rounds.

    Args:
        calls: The callables to time, by name.
        rounds: Counted rounds.
        warmup: Rounds before them that are not counted.
        on_turn: Called after each turn of each callable.
        clock: Nanoseconds; time.process_time_ns for callables of one thread on a machine that
            other programs use too.

    Returns:
        Name to times in milliseconds, one per counted round, in order.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for index in range(-warmup, rounds):
            for place in round_order(len(names), index % (2 * len(names))):
                elapsed_ms = _time_turn(calls[names[place]], clock)
                if index >= 0:
                    times[names[place]].append(elapsed_ms)
                on_turn()
    finally:
        if was_enabled:
            gc.enable()
    return times


def _time_turn(call: Callable[[], object], clock: Callable[[], int]) -> float:
    wait_until_idle()
    call()
    started = clock()
    call()
    return (clock() - started) / 1e6


@dataclass(frozen=True)
class Ratio:
    """A ratio with its 95 % interval."""

    ratio: float
    low: float
    high: float


def _ratio_of_medians(
    baseline_ms: NDArray[np.floating], target_ms: NDArray[np.floating], axis: int = -1
) -> NDArray[np.floating]:
    return np.median(baseline_ms, axis=axis) / np.median(target_ms, axis=axis)


def compare_times(
    baseline_ms: Sequence[float],
    target_ms: Sequence[float],
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> Ratio:
    """Return median(baseline) / median(target) with a percentile bootstrap over paired rounds.

    Args:
        baseline_ms: Times of the baseline, one per round.
        target_ms: Times of the target in the same rounds.
        seed: Seed of the resampling; the same times and seed give the same interval.
        num_resamples: Resamples of the bootstrap.

    Returns:
        The ratio; above 1 the target is faster. The interval always contains it.
    """
    # SciPy's statistics take longer to import than all the rest of the command line.
    from scipy.stats import bootstrap

    data = (np.asarray(baseline_ms, dtype=np.float64), np.asarray(target_ms, dtype=np.float64))
    ratio = float(_ratio_of_medians(*data))
    interval = bootstrap(
        data,
        _ratio_of_medians,
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=CONFIDENCE,
        n_resamples=num_resamples,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Ratio(ratio, min(ratio, float(interval.low)), max(ratio, float(interval.high)))
