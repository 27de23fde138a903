"""Time a run's CPU graphs in one interleaved run; for measurements on another instruction set.

    python kernels/bench/bench_run.py --run runs/digits --out FILE
    python tests/emulate/without_avx512.py python kernels/bench/bench_run.py ... --note TEXT

One thread. FILE holds all raw processor times, in which other programs do not count, ratios to ONNX
Runtime's float32 with 95 % intervals, the environment, the instruction set of our kernels, and the
note.
"""

import argparse
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
from rich.console import Console

from treeq_export.artefacts import write_json
from treeq_export.bench.timing import compare_times, time_rounds
from treeq_export.environment import describe_environment
from treeq_export.run_folder import RunFolder
from treeq_export.runners.cpu_kernels import read_isa
from treeq_export.targets.table import different_ways, open_way

FP32 = "fp32"
TARGETS = ("ort", "portable")


def make_inputs(model: Path, batch: int, seed: int) -> dict[str, np.ndarray]:
    """Return inputs of a graph: normal numbers; 0 or 1 where it takes integers."""
    rng = np.random.default_rng(seed)
    inputs = {}
    for value in onnx.load(model, load_external_data=False).graph.input:
        tensor = value.type.tensor_type
        shape = [dim.dim_value or batch for dim in tensor.shape.dim]
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        is_float = np.issubdtype(kind, np.floating)
        values = rng.standard_normal(shape) if is_float else rng.integers(0, 2, shape)
        inputs[value.name] = values.astype(kind)
    return inputs


def time_batch(runners: dict[str, Any], inputs: dict[str, np.ndarray], rounds: int) -> list[dict]:
    """Return one row per way to run."""
    times = time_rounds(
        {name: (lambda runner=runner: runner.run(inputs)) for name, runner in runners.items()},
        rounds=rounds,
        warmup=1,
        on_turn=lambda: None,
        clock=time.process_time_ns,
    )
    rows = []
    for name, values in times.items():
        ratio = compare_times(times[FP32], values, seed=0)
        rows.append(
            {
                "target": name,
                "batch": len(next(iter(inputs.values()))),
                "median_cpu_ms": median(values),
                "times_fp32": ratio.ratio,
                "low": ratio.low,
                "high": ratio.high,
                "all_cpu_times_ms": values,
            }
        )
    return rows


def main() -> None:
    """Time everything and write the record."""
    parser = argparse.ArgumentParser(description="Time the CPU graphs of a run.")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", type=lambda text: [int(b) for b in text.split(",")])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--note", default="")
    arguments = parser.parse_args()
    names = [FP32, *(name for name in TARGETS if (arguments.run / RunFolder.graph(name)).is_file())]
    rows = []
    with ExitStack() as stack:
        runners = {
            way.name: stack.enter_context(open_way(arguments.run, way.name, threads=1))
            for way in different_ways(names)
        }
        for batch in arguments.batches or [2, 32]:
            inputs = make_inputs(arguments.run / RunFolder.graph(FP32), batch, seed=1)
            rows += time_batch(runners, inputs, arguments.rounds)
    console = Console(highlight=False)
    for row in rows:
        console.print(
            f"batch {row['batch']:3} {row['target']:10} {row['median_cpu_ms']:8.2f} CPU-ms "
            f"{row['times_fp32']:5.2f}x ({row['low']:.2f} to {row['high']:.2f})"
        )
    environment = describe_environment(1) | {"isa": read_isa()}
    record = {"note": arguments.note, "rows": rows, "environment": environment}
    write_json(arguments.out, record)


if __name__ == "__main__":
    main()
