"""Time `treeq_qlinear` against other runtimes on the linears of DiT-XL/2, one thread.

`python kernels/bench/bench_qlinear.py --out samples/results/cpu_kernels` writes bench.json (all raw
times, the environment) and bench.png. For each shape and number of tokens M all contenders run in
interleaved rounds (treeq_export/bench/timing.py); the peak of the processor's integer product, from
registers only, is timed in the same rounds. Speeds count 2 M N K operations, whatever a contender
does besides: ours rotates and quantizes its activations, adds a bias and scales.
"""

import argparse
import ctypes
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch

import numpy as np
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parent))
from contenders import open_contenders, versions

from treeq_export.artefacts import write_json
from treeq_export.bench.timing import compare_times, time_rounds
from treeq_export.environment import describe_environment
from treeq_export.runners.cpu_kernels import load_kernels, read_isa

# K, N by name: the four linears of a block, q, k and v as one, and adaLN.
SHAPES = {
    "qkv": (1152, 3456),
    "proj": (1152, 1152),
    "fc1": (1152, 4608),
    "fc2": (4608, 1152),
    "adaln": (1152, 6912),
}
BLOCK = ("qkv", "proj", "fc1", "fc2")
TOKENS = (1, 16, 64, 256, 512, 1024)
PEAK = "peak"
PEAK_ITERATIONS = 200_000
BASELINE = "ort_fp32"


def main() -> None:
    """Time everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor times, on a machine that others use too"
    )
    parser.add_argument("--note", default="")
    parser.add_argument("--tokens", type=lambda text: [int(m) for m in text.split(",")])
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    tokens = arguments.tokens or TOKENS
    clock = time.process_time_ns if arguments.cpu_time else time.perf_counter_ns
    rows: list[dict[str, Any]] = []
    with Progress(transient=True) as progress:
        bar = progress.add_task("bench", total=len(SHAPES) * len(tokens))
        for shape, (k, n) in SHAPES.items():
            with open_contenders(k, n, seed=0) as calls:
                for m in tokens:
                    rows += time_shape(shape, k, n, m, calls, arguments.rounds, clock)
                    progress.advance(bar)
    record = {
        "shapes": SHAPES,
        "tokens": list(tokens),
        "rows": rows,
        "block": summarise_block(rows, tokens),
        "environment": describe_environment(1)
        | versions()
        | {
            "isa": read_isa(),
            "rounds": arguments.rounds,
            "clock": "processor" if arguments.cpu_time else "wall",
            "note": arguments.note,
        },
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "bench.json", record)
    from draw import draw_speed, print_table

    draw_speed(record, arguments.out / "bench.png")
    print_table(record)


def time_shape(
    shape: str,
    k: int,
    n: int,
    m: int,
    calls: dict[str, Any],
    rounds: int,
    clock: Callable[[], int],
) -> list[dict[str, Any]]:
    """Return one row per contender, and one for the peak."""
    x = np.random.default_rng(1).standard_normal((m, k)).astype(np.float32)
    operations = ctypes.c_int64()
    library = load_kernels()
    timed = {name: (lambda call=call: call(x)) for name, call in calls.items()}
    timed[PEAK] = lambda: library.treeq_peak(PEAK_ITERATIONS, ctypes.byref(operations))
    times = time_rounds(timed, rounds=rounds, warmup=1, on_turn=lambda: None, clock=clock)
    rows = []
    for name, values in times.items():
        count = operations.value if name == PEAK else 2 * m * n * k
        rows.append(
            {
                "shape": shape,
                "m": m,
                "target": name,
                "median_ms": median(values),
                "gops": count / median(values) / 1e6,
                "all_times_ms": values,
            }
        )
    return rows


def summarise_block(rows: list[dict[str, Any]], tokens: Any) -> list[dict[str, Any]]:
    """Return, by M and target, the time of a block's four linears and its ratio to float32."""
    summary = []
    for m in tokens:
        times: dict[str, np.ndarray] = {}
        for row in rows:
            if row["m"] == m and row["shape"] in BLOCK:
                times[row["target"]] = times.get(row["target"], 0) + np.array(row["all_times_ms"])
        for target, values in times.items():
            if target == PEAK:
                continue
            ratio = compare_times(times[BASELINE].tolist(), values.tolist(), seed=0)
            summary.append(
                {
                    "m": m,
                    "target": target,
                    "median_ms": float(np.median(values)),
                    "ratio": ratio.ratio,
                    "low": ratio.low,
                    "high": ratio.high,
                }
            )
    return summary


if __name__ == "__main__":
    main()
