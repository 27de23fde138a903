"""What a measurement depends on, in words that do not name the machine or its folders."""

import logging
import os
import platform
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

import psutil

from treeq_export import __version__

# Instruction sets that decide how fast low-bit arithmetic can be (x86, then Arm).
INSTRUCTION_SETS = (
    "avx2",
    "fma",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "asimddp",
    "i8mm",
    "sve",
)
# Those of them with an exact 8-bit dot product; x86 without one adds pairs of products in 16 bits.
VNNI = frozenset({"avx_vnni", "avx512_vnni", "amx_int8"})
_CPU_INFO = Path("/proc/cpuinfo")
_STATUS = Path("/proc/self/status")
_CGROUP = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_FEW_CPUS = 4  # with more, the factorizations of large layers gain from threads

_log = logging.getLogger(__name__)


def read_cpu(cpu_info: Path = _CPU_INFO) -> tuple[str, list[str]]:
    """Return the processor's model name and those of `INSTRUCTION_SETS` that it has.

    Args:
        cpu_info: A file in the format of Linux' /proc/cpuinfo; where it is missing the model is
            what Python knows and the list is empty.
    """
    fields: dict[str, str] = {}
    if cpu_info.is_file():
        for line in cpu_info.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    model = fields.get("model name") or platform.processor() or platform.machine()
    return model, [name for name in INSTRUCTION_SETS if name in flags]


def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def runtime_version() -> str | None:
    """Return the version of ONNX Runtime, whichever of its packages is installed."""
    return version_of("onnxruntime") or version_of("onnxruntime-gpu")


def available_cpus(cgroup: Path = _CGROUP, membership: Path = _MEMBERSHIP) -> int:
    """Return how many processors this process may use: by affinity, and by its container's quota.

    Args:
        cgroup: Folder in which Linux mounts control groups.
        membership: A file in the format of Linux' /proc/self/cgroup.

    Returns:
        At least 1; part of a processor counts as one.
    """
    count = len(_affinity())
    for folder in _control_groups("cpu", cgroup, membership):
        quota, period = _read_quota(folder)
        if quota > 0 and period > 0:
            count = min(count, -(-quota // period))
    return max(count, 1)


def _read_quota(folder: Path) -> tuple[int, int]:
    """Return the microseconds of processor time and the period that they are for; 0: no limit."""
    with suppress(OSError, ValueError):  # version 2
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota), int(period)  # "max" is no number
    with suppress(OSError, ValueError):  # version 1
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        quota, period = (int((folder / name).read_text()) for name in names)
        return quota, period
    return 0, 0


def available_memory(cgroup: Path = _CGROUP, membership: Path = _MEMBERSHIP) -> int:
    """Return the bytes that this process can have at most: the machine's, or its container's.

    Args:
        cgroup: Folder in which Linux mounts control groups.
        membership: File in the format of Linux' /proc/self/cgroup.
    """
    limits = [psutil.virtual_memory().total + psutil.swap_memory().total]
    for folder in _control_groups("memory", cgroup, membership):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):
                limits.append(int((folder / name).read_text()))
    return min(limits)


def _control_groups(controller: str, cgroup: Path, membership: Path) -> Iterator[Path]:
    """Yield this process' control groups from the innermost out, of both versions."""
    text = membership.read_text() if membership.is_file() else ""
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Version 2 is mounted at the root, or at "unified" beside the controllers of version 1.
        for mount in (controllers, controller) if controllers else ("", "unified"):
            group = PurePosixPath(path.lstrip("/"))
            yield from (cgroup / mount / part for part in (group, *group.parents))


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def settle_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Choose how OpenMP works in this process and its children, where the user has not.

    A library reads these variables once, when it is loaded: call this before PyTorch is imported.
    GNU's OpenMP lets a thread that waits for others spin for milliseconds. Where others want the
    core, it so takes the time that those it waits for need. Sleeping at once is as bad where nobody
    does. Training the digits model on two cores of an AMD EPYC (20 steps, two runs each) took

        spin count            alone          beside two busy processes
        300000 (default)    5.8,  5.7 s      36.3, 37.7 s
        3000                8.2,  6.8 s      13.5, 17.6 s
        0                  15.7, 13.1 s      18.3,  9.3 s

    NumPy's OpenBLAS spins too, and has no such setting: with one thread calibration took 7.3 s
    alone and 8.9 s beside two busy processes, with two threads 8.0 s and 66.6 s, with equal bytes.
    Where there are few processors it gets one.

    Args:
        environment: Is changed.
    """
    if "OMP_NUM_THREADS" not in environment and available_cpus() <= _FEW_CPUS:
        environment.setdefault("OPENBLAS_NUM_THREADS", "1")
    environment.setdefault("OMP_NUM_THREADS", str(available_cpus()))
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "3000")


def default_threads(environment: Mapping[str, str] = os.environ) -> int:
    """Return the threads of a runtime that is given no number: OpenMP's, or one per processor."""
    text = environment.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdigit() and int(text) > 0 else available_cpus()


def read_peak_bytes(status: Path = _STATUS) -> int:
    """Return the largest resident size of this process; 0 where the system does not say.

    Args:
        status: A file in the format of Linux' /proc/self/status.
    """
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def describe_machine() -> dict[str, Any]:
    """Return what of this machine a time depends on.

    Returns:
        Processor, memory (bytes), load average over 1, 5 and 15 minutes, versions.
    """
    model, instruction_sets = read_cpu()
    return {
        "cpu": model,
        "instruction_sets": instruction_sets,
        "cores": available_cpus(),
        "ram_bytes": psutil.virtual_memory().total,
        "load_average": list(os.getloadavg()),
        "os": " ".join((platform.system(), *platform.libc_ver(), platform.machine())),
        "python": platform.python_version(),
        "numpy": version_of("numpy"),
        "treeq_export": __version__,
    }


def describe_environment(threads: int) -> dict[str, Any]:
    """Return the environment of a measurement of runtimes that is about to start.

    Args:
        threads: Threads that every runtime is given.

    Returns:
        As `describe_machine`, with the threads and the versions of the runtimes.
    """
    return {
        **describe_machine(),
        "threads": threads,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
        "torch": version_of("torch"),
        "onnxruntime": runtime_version(),
    }


def warn_if_busy(environment: Mapping[str, Any]) -> bool:
    """Warn when more programs want to run than there are cores.

    A scheduler's time slice of a few milliseconds is then added to a part of the times.

    Args:
        environment: From `describe_environment`.

    Returns:
        Whether it warned.
    """
    load, cores = environment["load_average"][0], environment["cores"]
    if load <= cores:
        return False
    _log.warning(
        "The load average is %.1f on %d cores: other programs disturb the times. "
        "Run bench again when they are done.",
        load,
        cores,
    )
    return True
