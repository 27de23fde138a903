"""Runs one graph in OpenVINO's CPU plugin: `python run_openvino.py ORDER`.

It runs in an environment of its own, which has openvino and numpy but not this project.
"""

import json
import sys
from pathlib import Path

import numpy as np


def run_order(path: Path) -> None:
    """Run the order of a file and write its output; end with one line where it is refused."""
    import openvino  # pyright: ignore[reportMissingImports]

    order = json.loads(path.read_text())
    feeds = {
        entry["name"]: np.fromfile(entry["file"], entry["dtype"]).reshape(entry["shape"])
        for entry in order["inputs"]
    }
    try:
        model = openvino.compile_model(order["model"], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        results = model(feeds)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        sys.exit(([line for line in lines if "operation" in line] or lines)[-1][:300])
    np.asarray(results[0], np.float32).tofile(order["output"])


if __name__ == "__main__":
    run_order(Path(sys.argv[1]))
