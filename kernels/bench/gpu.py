"""Check and time the kernels on a GPU: one linear, a whole network, and TensorRT-RTX's engines.

    python kernels/bench/gpu.py --out DIR [--run RUN]

writes DIR/bench.json (gpu_qlinear.py), DIR/end_to_end.json (gpu_end_to_end.py) and, for a run with
engines of TensorRT-RTX, DIR/rtx.json (gpu_rtx.py). `--device interpreter --smoke` runs the same on
small shapes in Triton's interpreter, without measuring anything, and says so in the records.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ["TRITON_INTERPRET"] = str(int("interpreter" in sys.argv))  # treeq_gpu reads it
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
sys.path.insert(0, str(Path(__file__).parent))

import gpu_end_to_end
import gpu_qlinear
import gpu_rtx
import torch
from gpu_summary import print_summary

from treeq_export.artefacts import write_json
from treeq_export.bench.gpu_timing import describe_gpu_environment

PARTS = ("linears", "network")


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything; return 1 where an integer differs from the reference, or y is not finite."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--run", type=Path, help="run folder with engines of TensorRT-RTX")
    parser.add_argument("--device", choices=("cuda", "interpreter"), default="cuda")
    parser.add_argument("--rounds", type=int, default=50, help="counted rounds [50]")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part")
    parser.add_argument("--only", default="", help="networks to time, separated by commas [all]")
    parser.add_argument("--smoke", action="store_true", help="small shapes, two rounds")
    arguments = parser.parse_args(argv)
    device = torch.device("cpu" if arguments.device == "interpreter" else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("gpu: no CUDA GPU. Run it on one, or with --device interpreter.\n")
        return 1
    out, parts = arguments.out, arguments.part or PARTS
    out.mkdir(parents=True, exist_ok=True)
    environment, rounds = describe_gpu_environment(), 2 if arguments.smoke else arguments.rounds
    wrong = False
    with torch.no_grad():
        if "linears" in parts:
            record = gpu_qlinear.measure(device, rounds, environment, smoke=arguments.smoke)
            write_json(out / "bench.json", record)
            print_summary(record)
            wrong |= bool(record["integers"]["failures"])
        if "network" in parts:
            only = tuple(filter(None, arguments.only.split(",")))
            record = gpu_end_to_end.measure(
                device, rounds, environment, smoke=arguments.smoke, only=only
            )
            write_json(out / "end_to_end.json", record)
            sys.stdout.write("\n".join(gpu_end_to_end.table(record)) + "\n")
            wrong |= not all(row.get("finite", True) for row in record["rows"])
    if arguments.run is not None:
        record = gpu_rtx.measure(arguments.run, environment)
        write_json(out / "rtx.json", record)
        sys.stdout.write("".join(f"{json.dumps(row)}\n" for row in record["engines"]))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
