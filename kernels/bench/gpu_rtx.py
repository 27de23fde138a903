"""Does an engine that TensorRT-RTX built for one GPU load and run on this one?

Each engine of a run is compared with ONNX Runtime on the same input, in a process of its own with a
time limit, because a runtime may abort: `python gpu_rtx.py ENGINE DATA`.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_INPUTS, _EXPECTED = "inputs.safetensors", "expected.safetensors"
_TIMEOUT_S = 120
_NUM_RUNS = 4  # plain, captured, replayed


def measure(run: Path, environment: dict[str, Any]) -> dict[str, Any]:
    """Try every TensorRT-RTX engine of a run; one that does not load is a finding, no failure.

    Args:
        run: The run folder.
        environment: Description of the machine.

    Returns:
        The record, rtx.json.
    """
    rows = []
    for manifest in sorted((run / "engines" / "tensorrt-rtx").glob("*/*/manifest.json")):
        with tempfile.TemporaryDirectory(prefix="treeq-rtx-") as folder:
            write_data(run, manifest.parts[-3], Path(folder))
            rows.append(try_engine(manifest.parent, Path(folder)))
    return {"environment": environment, "engines": rows}


def write_data(run: Path, target: str, folder: Path) -> None:
    """Write an input and what the compiled graph makes of it on the CPU."""
    from safetensors.numpy import save_file

    from treeq_export.pipeline.workspace import Workspace
    from treeq_export.targets.table import open_way

    with Workspace.reopen(run) as workspace, open_way(run, target) as runner:
        example = workspace.denoiser.make_example_inputs(2, seed=0)
        inputs = {name: value.numpy() for name, value in example.items()}
        output = runner.run(inputs)
    save_file(inputs, folder / _INPUTS)
    save_file({"output": output.astype("float32")}, folder / _EXPECTED)


def run_engine(folder: Path, data: Path) -> dict[str, Any]:
    """Load an engine whatever GPU it was built for, and compare its output."""
    from safetensors.numpy import load_file

    from treeq_export.quant.metrics import sqnr_db
    from treeq_export.runners.engine_manifest import read_manifest
    from treeq_export.runners.tensorrt_runner import TensorrtRunner

    manifest = read_manifest(folder)
    inputs, expected = load_file(data / _INPUTS), load_file(data / _EXPECTED)["output"]
    runner = TensorrtRunner(folder, "tensorrt-rtx", gpu=manifest.gpu)
    with runner:
        outputs = [runner.run(inputs) for _ in range(_NUM_RUNS)]
        graphs = [list(map(list, shapes)) for shapes in runner.graph_shapes]
    return {
        "loaded": True,
        "built_for": manifest.gpu,
        "target": manifest.target,
        "sqnr_db": sqnr_db(expected, outputs[0]),
        "repeatable": all((output == outputs[0]).all() for output in outputs),
        "cuda_graphs": graphs,
    }


def try_engine(folder: Path, data: Path, timeout_s: float = _TIMEOUT_S) -> dict[str, Any]:
    """Run an engine in a child process; return its result, or how it ended."""
    command = [sys.executable, str(Path(__file__).absolute()), str(folder), str(data)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"engine": folder.name, "loaded": False, "error": f"no end after {timeout_s:g} s"}
    if done.returncode == 0:
        return {"engine": folder.name} | json.loads(done.stdout.splitlines()[-1])
    lines = (done.stderr.strip() or "no message").splitlines()
    status = f"status {done.returncode}: {lines[-1].strip()[:300]}"
    return {"engine": folder.name, "loaded": False, "error": status}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run_engine(Path(sys.argv[1]), Path(sys.argv[2]))) + "\n")
