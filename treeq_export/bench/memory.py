"""Memory of each target, in a process of its own.

The process imports its runtime, notes its resident bytes, loads the model, and runs it a few times:

    after_load_bytes = resident after load - resident just before it
    peak_bytes       = largest resident during load and runs - resident just before the load

So what the interpreter and the runtime's libraries take is left out, and memory-mapped weights
count as far as they were touched. Linux' own peak counter (VmHWM, reset before the load) is read;
`getrusage` would report the peak of the process that started this one where that is larger. Where
there is no such counter the peak is the resident size after the runs.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from treeq_export.errors import RunnerError
from treeq_export.reading import read_record
from treeq_export.records import BenchMemory, Record

NUM_RUNS = 3
_TIMEOUT_S = 1800
_CHILD = "treeq_export.bench.memory_child"
# What a process needs to find its libraries and caches; all else could change its memory.
_KEPT_VARIABLES = ("PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR", "LANG")


class MeasuredMemory(Record):
    """What the child writes; the fields are those of BenchMemory."""

    after_load_bytes: int
    peak_bytes: int
    load_s: float
    file_bytes: int


def measure_memory(
    target: str, what: Mapping[str, Any], inputs: Mapping[str, NDArray[Any]], threads: int
) -> BenchMemory:
    """Load and run one target in a child process.

    Args:
        target: Its name in the record.
        what: {"onnx": path of the model file, "options": of OrtRunner} or {"torch": the recipe's
            model section as a dict}.
        inputs: Inputs of one call by name.
        threads: Threads of the runtime.

    Returns:
        Memory in bytes as the module's docstring defines it, and the time to load.

    Raises:
        RunnerError: The child failed; the message ends with the last line it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="treeq-bench-") as name:
        folder = Path(name)
        result_file = folder / "result.json"
        save_file(
            {key: np.ascontiguousarray(value) for key, value in inputs.items()},
            folder / "inputs.safetensors",
        )
        order = {
            "what": dict(what),
            "input_names": list(inputs),
            "inputs": str(folder / "inputs.safetensors"),
            "threads": threads,
            "num_runs": NUM_RUNS,
            "result": str(result_file),
        }
        # -P: the folder it runs in is no place to import from.
        done = subprocess.run(
            [sys.executable, "-P", "-m", _CHILD, json.dumps(order)],
            cwd=folder,
            env=_child_environment(threads),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        if done.returncode or not result_file.is_file():
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise RunnerError(
                f"{target}: the process that measures memory ended with status "
                f"{done.returncode}: {lines[-1].strip()}"
            )
        measured = read_record(
            result_file, MeasuredMemory, error=RunnerError, remedy="Run bench again."
        )
    return BenchMemory(target=target, **measured.model_dump())


def _child_environment(threads: int) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT_VARIABLES or name.startswith("TREEQ_")
    }
    package = Path(__file__).parents[2]
    return kept | {
        "PYTHONPATH": str(package),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }
