"""Does an engine that TensorRT-RTX built for one GPU load and run on this one?

    python kernels/bench/gpu_rtx.py --engine FOLDER [--engine FOLDER ...] --out DIR

FOLDER is an engine's folder of `treeq-export build`, with inputs.safetensors and
expected.safetensors in it (gpu_prepare.py writes them), so that what it computes can be compared.
Each engine runs in a process of its own with a time limit, because a runtime may abort.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "kernels" / "gpu"))

RECORD_FILE = "rtx.json"
INPUTS, EXPECTED = "inputs.safetensors", "expected.safetensors"
_TIMEOUT_S = 120
_NUM_RUNS = 4  # plain, captured, replayed


def run_engine(folder: Path) -> dict[str, Any]:
    """Load an engine whatever GPU it was built for, and compare its output."""
    from safetensors.numpy import load_file

    from treeq_export.quant.metrics import sqnr_db
    from treeq_export.runners.engine_manifest import read_manifest
    from treeq_export.runners.tensorrt_runner import TensorrtRunner

    manifest = read_manifest(folder)
    inputs, expected = load_file(folder / INPUTS), load_file(folder / EXPECTED)["output"]
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


def try_engine(folder: Path, timeout_s: float = _TIMEOUT_S) -> dict[str, Any]:
    """Run an engine in a child process; return its result, or how it ended."""
    command = [sys.executable, str(Path(__file__).absolute()), "--child", str(folder)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {"engine": folder.name, "loaded": False, "error": f"no end after {timeout_s:g} s"}
    if done.returncode == 0:
        return {"engine": folder.name} | json.loads(done.stdout.splitlines()[-1])
    lines = (done.stderr.strip() or "no message").splitlines()
    status = f"status {done.returncode}: {lines[-1].strip()[:300]}"
    return {"engine": folder.name, "loaded": False, "error": status}


def main(argv: Sequence[str] | None = None) -> int:
    """Try every engine and write the record; what does not load is a finding, no failure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", type=Path, action="append", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child is not None:
        sys.stdout.write(json.dumps(run_engine(arguments.child)) + "\n")
        return 0
    from treeq_export.artefacts import write_json
    from treeq_export.bench.gpu_timing import describe_gpu_environment

    rows = [try_engine(folder) for folder in arguments.engine]
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {"environment": describe_gpu_environment(), "engines": rows}
    write_json(arguments.out / RECORD_FILE, record)
    sys.stdout.write("".join(f"{json.dumps(row)}\n" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
