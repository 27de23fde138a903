"""The process that `bench.memory` starts: load one target, run it, report its memory.

`python -m treeq_export.bench.memory_child ORDER`, ORDER being JSON from `measure_memory`, with the
inputs on stdin. All libraries are imported before the first reading. No file is written.
"""

import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

import psutil
from numpy.typing import NDArray
from safetensors.numpy import load

from treeq_export.children import take_stdout
from treeq_export.environment import read_peak_bytes
from treeq_export.errors import RunnerError
from treeq_export.reading import parse_json
from treeq_export.recipe import ModelSection
from treeq_export.runners.model_files import model_files

_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # see proc_pid_clear_refs(5)


def resident_bytes() -> int:
    """Return the bytes of this process that are in memory."""
    return psutil.Process().memory_info().rss


def reset_peak(clear_refs: Path = _CLEAR_REFS) -> None:
    """Let the peak counter start again at the present size, where the system can do that."""
    try:
        clear_refs.write_text(_RESET_PEAK)
    except OSError:
        return


def measure(
    load: Callable[[], AbstractContextManager[Any]],
    inputs: Mapping[str, NDArray[Any]],
    num_runs: int,
) -> dict[str, Any]:
    """Load a runner, run it, and return its memory and load time.

    Args:
        load: Returns a runner that loads its model in __enter__ or before.
        inputs: Inputs of one call by name.
        num_runs: Calls.

    Returns:
        after_load_bytes, peak_bytes and load_s of `BenchMemory`.
    """
    gc.collect()
    reset_peak()
    before = resident_bytes()
    started = time.perf_counter()
    with load() as runner:
        load_s = time.perf_counter() - started
        after_load = resident_bytes()
        for _ in range(num_runs):
            runner.run(inputs)
        peak = max(read_peak_bytes() or resident_bytes(), after_load)
    return {
        "after_load_bytes": max(after_load - before, 0),
        "peak_bytes": max(peak - before, 0),
        "load_s": load_s,
    }


def prepare_onnx(
    path: Path, threads: int, runner_options: Mapping[str, bool]
) -> tuple[Callable[[], AbstractContextManager[Any]], list[Path]]:
    """Import ONNX Runtime; return how to load the graph, and its files."""
    import onnxruntime

    from treeq_export.runners.ort_runner import OrtRunner

    onnxruntime.get_available_providers()
    return lambda: OrtRunner(path, threads=threads, **runner_options), model_files(path)


def prepare_torch(
    section: ModelSection, threads: int
) -> tuple[Callable[[], AbstractContextManager[Any]], list[Path]]:
    """Import PyTorch and the model's class; return how to load the checkpoint, and its files."""
    import diffusers

    from treeq_export.model.checkpoint import load_model, open_checkpoint
    from treeq_export.model.conditioning import make_denoiser
    from treeq_export.runners.torch_runner import TorchRunner

    checkpoint = open_checkpoint(Path(section.checkpoint), section.variant)
    getattr(diffusers, checkpoint.class_name)  # diffusers imports its classes on first use

    def load() -> AbstractContextManager[Any]:
        denoiser = make_denoiser(load_model(checkpoint), checkpoint, section)
        return TorchRunner(denoiser, threads=threads)

    return load, list(checkpoint.files)


def main(text: str, inputs: bytes, answer: TextIO) -> None:
    """Carry out an order.

    Args:
        text: The order, JSON.
        inputs: Inputs of one call by name, safetensors.
        answer: Takes the result as JSON: all of `BenchMemory` but the target.
    """
    order = parse_json(text, "the order", error=RunnerError, remedy="Run bench again.")
    what = order["what"]
    if "onnx" in what:
        prepared, files = prepare_onnx(Path(what["onnx"]), order["threads"], what["options"])
    else:
        section = ModelSection.model_validate(what["torch"])
        prepared, files = prepare_torch(section, order["threads"])
    arrays = load(inputs)
    ordered = {name: arrays[name] for name in order["input_names"]}
    result = measure(prepared, ordered, order["num_runs"])
    result["file_bytes"] = sum(file.stat().st_size for file in files)
    json.dump(result, answer)
    answer.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.stdin.buffer.read(), take_stdout())
