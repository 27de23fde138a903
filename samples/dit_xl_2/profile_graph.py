"""Where a compiled graph spends its time: the profile of ONNX Runtime, by operator.

`python samples/dit_xl_2/profile_graph.py --run runs/xl_w3a3 --out profile.json` runs the target
`ort` a few times at batch 2 on two threads and prints a table; times are per call.
"""

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from rich.console import Console
from rich.table import Table

from treeq_export.artefacts import write_json
from treeq_export.run_folder import RunFolder
from treeq_export.runners.cpu_kernels import ORT_LIBRARY, find_library
from treeq_export.targets.table import way_named

NUM_CALLS = 5
BATCH = 2
DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


def main() -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser(description="Profile a compiled graph by operator.")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--target", default="ort")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    way = way_named(arguments.target)
    path = arguments.run / RunFolder.graph(way.target)
    events = run_profile(path, arguments.threads, kernels=way.uses_kernels)
    rows = summarise(events)
    write_json(arguments.out, {"target": arguments.target, "batch": BATCH, "rows": rows})
    table = Table("operator", "nodes", "ms a call", "share")
    for row in rows:
        name, nodes = row["operator"], str(row["nodes"])
        table.add_row(name, nodes, f"{row['ms']:.1f}", f"{row['share']:.1%}")
    Console().print(table)


def run_profile(path: Path, threads: int, *, kernels: bool) -> list[dict[str, Any]]:
    """Return the profile's events."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        library = find_library(ORT_LIBRARY) if kernels else None
        if library is not None:
            options.register_custom_ops_library(str(library))
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feeds = {}
        for value in session.get_inputs():
            shape = [size if isinstance(size, int) else BATCH for size in value.shape]
            feeds[value.name] = np.ones(shape, DTYPES[value.type])
        for _ in range(NUM_CALLS):
            session.run(None, feeds)
        return json.loads(Path(session.end_profiling()).read_text())


def summarise(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return time and nodes by operator, the longest first."""
    times: Counter[str] = Counter()
    nodes: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["args"]["op_name"]] += event["dur"]
            nodes[event["args"]["op_name"]] += 1
    total = sum(times.values())
    return [
        {
            "operator": name,
            "nodes": nodes[name] // NUM_CALLS,
            "ms": microseconds / 1e3 / NUM_CALLS,
            "share": microseconds / total,
        }
        for name, microseconds in times.most_common()
    ]


if __name__ == "__main__":
    main()
