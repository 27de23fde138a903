"""Timing GPU work: interleaved rounds, CUDA events, L2 cleared before every launch.

As in `bench.timing` a round runs every callable once, in the orders of a Williams design. A turn is

    write twice the L2's size  ->  event  ->  the call  ->  event

all in stream order, so the host's launch time is hidden behind the write and only the GPU's time is
between the events. Calls should be replays of CUDA graphs: then a call of two kernels has no gap
that the host made. Times are read after each round.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from treeq_export.bench.timing import Ratio, compare_times, round_order
from treeq_export.environment import describe_environment, version_of

L2_FACTOR = 2
NUM_RESAMPLES = 999  # thousands of ratios are made while a GPU waits


class Timer(Protocol):
    """Times one call at a time; the times come at the end of a round."""

    def start(self, call: Callable[[], object]) -> None:
        """Clear the cache and launch a call between two events."""
        ...

    def finish(self) -> list[float]:
        """Wait, and return the milliseconds of the calls since the last `finish`, in order."""
        ...


class CudaTimer:
    """The timer of a CUDA device. Untested: needs a GPU.

    Args:
        clear_l2: Whether to write over the L2 cache before each call.
    """

    def __init__(self, *, clear_l2: bool = True) -> None:
        import torch

        self._torch = torch
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        num_bytes = L2_FACTOR * int(properties.L2_cache_size)
        self._sweep = torch.empty(num_bytes, dtype=torch.int8, device="cuda") if clear_l2 else None
        self._events: list[tuple[Any, Any]] = []

    def start(self, call: Callable[[], object]) -> None:
        """See `Timer.start`."""
        begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self._sweep is not None:
            self._sweep.zero_()
        begin.record()
        call()
        end.record()
        self._events.append((begin, end))

    def finish(self) -> list[float]:
        """See `Timer.finish`."""
        self._torch.cuda.synchronize()
        times = [round(begin.elapsed_time(end), 6) for begin, end in self._events]
        self._events = []
        return times


class EmulatedTimer:
    """Runs the calls and measures nothing: without a GPU there is no time to report."""

    def start(self, call: Callable[[], object]) -> None:
        """Run a call."""
        call()

    def finish(self) -> list[float]:
        """Return no times."""
        return []


def time_interleaved(
    calls: Mapping[str, Callable[[], object]], timer: Timer, *, rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Time callables in interleaved rounds.

    Args:
        calls: Callables to time, by name.
        timer: Times a call.
        rounds: Counted rounds.
        warmup: Rounds before them that are not counted.

    Returns:
        Name to milliseconds, one per counted round, in order; empty lists where the timer is
        emulated.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-warmup, rounds):
        order = round_order(len(names), index % (2 * len(names)))
        for place in order:
            timer.start(calls[names[place]])
        measured = timer.finish()
        if index >= 0 and measured:
            for place, elapsed_ms in zip(order, measured, strict=True):
                times[names[place]].append(elapsed_ms)
    return times


def ratios(
    times: Mapping[str, list[float]], baseline: str, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Return every other row's median(baseline) / median(row) with its 95 % interval.

    Args:
        times: From `time_interleaved`.
        baseline: A name in it; nothing is returned where it was not timed.
        seed: Seed of the bootstrap.
    """
    if not times.get(baseline):
        return {}
    made: dict[str, Ratio] = {
        name: compare_times(times[baseline], values, seed, NUM_RESAMPLES)
        for name, values in times.items()
        if name != baseline and values
    }
    return {
        name: {"ratio": ratio.ratio, "low": ratio.low, "high": ratio.high}
        for name, ratio in made.items()
    }


def describe_gpu_environment() -> dict[str, Any]:
    """Return what a measurement on a GPU depends on; `gpu` is None where there is none."""
    import torch

    environment = describe_environment(torch.get_num_threads())
    environment |= {"triton": version_of("triton"), "cuda": torch.version.cuda, "gpu": None}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        environment["gpu"] = {
            "name": properties.name,
            "architecture": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "state": read_gpu_state(),
        }
    return environment


def read_gpu_state() -> dict[str, str] | None:
    """Return driver, clocks, power and temperature as nvidia-smi tells them; it changes nothing."""
    import shutil
    import subprocess

    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    fields = ("driver_version", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=False)) if done.returncode == 0 else None
