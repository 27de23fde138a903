"""What a measurement depends on, in words that do not name the machine or its folders."""

import logging
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
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


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_machine() -> dict[str, Any]:
    """Return what of this machine a time depends on.

    Returns:
        Processor, memory (bytes), load average over 1, 5 and 15 minutes, versions.
    """
    model, instruction_sets = read_cpu()
    return {
        "cpu": model,
        "instruction_sets": instruction_sets,
        "cores": count_cores(),
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
