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
import signal
import subprocess
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from treeq_export.children import python_child
from treeq_export.errors import RunnerError
from treeq_export.memory import out_of_memory
from treeq_export.reading import parse_json
from treeq_export.records import BenchMemory

NUM_RUNS = 3
_TIMEOUT_S = 1800
_CHILD = "treeq_export.bench.memory_child"
# What a process needs to find its libraries and caches; all else could change its memory.
_KEPT_VARIABLES = ("PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR", "LANG")


def measure_memory(
    target: str, what: Mapping[str, Any], inputs: Mapping[str, NDArray[Any]], threads: int
) -> BenchMemory:
    """Load and run one target in a child process.

    Args:
        target: The target's name in the record.
        what: {"onnx": path of the model file, "options": of OrtRunner} or {"torch": the recipe's
            model section as a dict}.
        inputs: Inputs of one call by name.
        threads: Threads of the runtime.

    Returns:
        Memory in bytes as the module's docstring defines it, and the time to load.

    Raises:
        RunnerError: The child failed; the message ends with the last line it wrote.
        OutOfMemoryError: The system killed it.
    """
    arrays = {key: np.ascontiguousarray(value) for key, value in inputs.items()}
    order = {
        "what": dict(what),
        "input_names": list(inputs),
        "threads": threads,
        "num_runs": NUM_RUNS,
    }
    with python_child(
        _CHILD,
        json.dumps(order),
        environment=_child_environment(threads),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        try:
            answer, complaint = child.communicate(save(arrays), timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise RunnerError(
                f"{target}: the process that measures memory took more than {_TIMEOUT_S} s. "
                "Lower bench.batch_sizes, or give it a machine of its own."
            ) from error
    if child.returncode == -signal.SIGKILL:
        raise out_of_memory(f"bench, {target}", ("bench.batch_sizes",))
    if child.returncode:
        lines = complaint.decode(errors="replace").strip().splitlines() or ["no message"]
        raise RunnerError(
            f"{target}: the process that measures memory ended with status "
            f"{child.returncode}: {lines[-1].strip()}"
        )
    measured = parse_json(answer, target, error=RunnerError, remedy="Run bench again.")
    return BenchMemory(target=target, **measured)


def _child_environment(threads: int) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT_VARIABLES or name.startswith("TREEQ_")
    }
    return kept | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }
