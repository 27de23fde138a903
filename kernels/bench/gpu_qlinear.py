"""Check and time `treeq::QLinear` on a GPU, on the linears of DiT-XL/2.

    python kernels/bench/gpu_qlinear.py --out DIR [--parts DIR] [--budget-s 540]

First the integers are compared with the CPU reference over all shapes, formats and numbers of
tokens (gpu_check.py); then all contenders (gpu_contenders.py) are timed, one interleaved run per
shape and number of tokens (bench/gpu_timing.py); then the kernels that ran are read back as SASS.
Each part is written to --parts as it ends and is not done again, so a run that was cut off goes on;
DIR/bench.json is what there is so far. `--device interpreter --smoke` runs all of it on small
shapes in Triton's interpreter without measuring anything, and says so in the record.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ["TRITON_INTERPRET"] = str(int("interpreter" in sys.argv))  # treeq_gpu reads it
# The GPU machine has the sources, not the installed package.
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from gpu_cases import (
    CHECKED_TOKENS,
    FORMATS,
    SHAPES,
    SMOKE_SHAPES,
    SMOKE_TOKENS,
    TOKENS,
    make_layer,
    make_tokens,
)
from gpu_check import check_case, failures, integer_sums
from gpu_contenders import BASELINES, make_layers, open_contenders
from gpu_sass import audit_recorded, recorded_kernels
from gpu_summary import print_summary, summarise
from gpu_tensorrt import open_opponents
from treeq_gpu import choose
from treeq_gpu.launch import DTYPE_NAMES

from treeq_export.artefacts import write_json
from treeq_export.bench.gpu_timing import (
    CudaTimer,
    EmulatedTimer,
    Timer,
    describe_gpu_environment,
    ratios,
    time_interleaved,
)

RECORD_FILE = "bench.json"
DTYPE = torch.bfloat16
WARM_PROCESSES = 12


@dataclass
class Session:
    """One run of this script.

    Attributes:
        device: "cuda" or "cpu" (the interpreter).
        shapes: K, N by name.
        tokens: Numbers of tokens that are timed.
        checked: Numbers of tokens whose integers are compared.
        rounds: Counted rounds.
        parts: Folder of finished parts.
        deadline: time.monotonic() after which no part is begun.
    """

    device: torch.device
    shapes: dict[str, tuple[int, int]]
    tokens: Sequence[int]
    checked: Sequence[int]
    rounds: int
    parts: Path
    deadline: float

    @property
    def emulated(self) -> bool:
        """Whether nothing is measured."""
        return self.device.type == "cpu"

    def timer(self) -> Timer:
        """Return what times calls here."""
        return EmulatedTimer() if self.emulated else CudaTimer()

    def jobs(self) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
        """Yield the name of every part and what computes its rows."""
        for shape in self.shapes:
            yield f"check_{shape}", lambda shape=shape: self.check(shape)
        for shape in self.shapes:
            yield f"time_{shape}", lambda shape=shape: self.time(shape)
        yield "sass", self.sass

    def check(self, shape: str) -> list[dict[str, Any]]:
        """Compare integers with the reference."""
        k, n = self.shapes[shape]
        rows = []
        for fmt in FORMATS:
            rows += check_case(shape, fmt, k, n, self.checked, self.device, DTYPE)
        return rows

    def time(self, shape: str) -> list[dict[str, Any]]:
        """Time all contenders at every number of tokens."""
        k, n = self.shapes[shape]
        layers = make_layers(k, n, self.device)
        opponents = open_opponents(k, n, self.device)
        timer = self.timer()
        rows = []
        for m in self.tokens:
            contenders = open_contenders(layers, m, self.device, DTYPE, opponents)
            with contenders as (calls, missing):
                times = time_interleaved(calls, timer, rounds=self.rounds, warmup=3)
            rows += make_rows(shape, k, n, m, times, missing)
        for row in rows:
            if row["target"] in opponents.layers:
                row["engine_layers"] = opponents.layers[row["target"]]
        return rows

    def sass(self) -> list[dict[str, Any]]:
        """Return what the kernels that layers launch are made of."""
        if self.emulated:
            return []
        with recorded_kernels() as kernels:
            for k, n in self.shapes.values():
                for layer in make_layers(k, n, self.device):
                    for m in self.tokens:
                        layer.run(make_tokens(m, k, self.device, DTYPE, seed=2))
        major, minor = torch.cuda.get_device_capability()
        return audit_recorded(kernels, f"sm_{major}{minor}")


def make_rows(
    shape: str, k: int, n: int, m: int, times: dict[str, list[float]], missing: dict[str, str]
) -> list[dict[str, Any]]:
    """Return one row per contender, with its ratio to each baseline of the same run."""
    compared = {name: ratios(times, name) for name in BASELINES}
    rows: list[dict[str, Any]] = []
    for target, values in times.items():
        against = {name: found[target] for name, found in compared.items() if target in found}
        rows.append(
            {
                "shape": shape,
                "k": k,
                "n": n,
                "m": m,
                "target": target,
                "median_ms": median(values) if values else None,
                "tops": 2e-9 * m * n * k / median(values) if values else None,
                "speedup": against,
                "all_times_ms": values,
            }
        )
    rows += [
        {"shape": shape, "m": m, "target": target, "missing": why}
        for target, why in missing.items()
    ]
    return rows


def representatives(session: Session, num_sms: int) -> list[tuple[int, int, int, int]]:
    """Return (format index, K, N, M) such that every kernel of the session is among them once."""
    found: dict[tuple[Any, ...], tuple[int, int, int, int]] = {}
    for index, fmt in enumerate(FORMATS):
        for k, n in session.shapes.values():
            for m in sorted({*session.tokens, *session.checked}):
                how = choose.choose_qlinear(
                    m, n, k, fmt.weight_bits, 0, num_sms, DTYPE_NAMES[DTYPE]
                )
                key = (index, how.instantiation, choose.shape_class_of(m, n, num_sms))
                found.setdefault(key, (index, k, n, m))
    return list(found.values())


def warm_one(case: tuple[int, int, int, int]) -> None:
    """Launch the kernels of one case, so that Triton's cache on disk has them."""
    index, k, n, m = case
    device = torch.device("cuda")
    layer = make_layer(FORMATS[index], k, n, device, seed=1)
    x = make_tokens(m, k, device, DTYPE, seed=2)
    codes, _ = layer.quantize(x)
    integer_sums(layer, codes)
    layer.product_of_sums(codes)
    layer.run(x)
    torch.cuda.synchronize()


def warm_up(session: Session) -> float:
    """Compile all kernels in parallel; return how long that took, in seconds."""
    started = time.monotonic()
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    cases = representatives(session, num_sms)
    with ProcessPoolExecutor(
        min(WARM_PROCESSES, len(cases)), mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        list(pool.map(warm_one, cases))
    return time.monotonic() - started


def run_parts(session: Session, out: Path, environment: dict[str, Any]) -> dict[str, Any]:
    """Run what is not done yet, and return the record of what there is."""
    done: dict[str, list[dict[str, Any]]] = {}
    record: dict[str, Any] = {}
    for name, compute in session.jobs():
        path = session.parts / f"{name}.json"
        if path.is_file():
            done[name] = json.loads(path.read_bytes())
        elif time.monotonic() < session.deadline:
            done[name] = compute()
            write_json(path, done[name])
            sys.stderr.write(f"{name}: done\n")
        record = make_record(session, done, environment)
        write_json(out / RECORD_FILE, record)
    return record


def make_record(
    session: Session, done: dict[str, list[dict[str, Any]]], environment: dict[str, Any]
) -> dict[str, Any]:
    """Return bench.json."""
    names = [name for name, _ in session.jobs()]
    checks = [row for name in names if name.startswith("check") for row in done.get(name, [])]
    rows = [row for name in names if name.startswith("time") for row in done.get(name, [])]
    return {
        "emulated": session.emulated,
        "not_done": [name for name in names if name not in done],
        "dtype": str(DTYPE).removeprefix("torch."),
        "shapes": session.shapes,
        "tokens": list(session.tokens),
        "rounds": session.rounds,
        "environment": environment,
        "integers": {
            "num_cases": len(checks),
            "failures": failures(checks),
            "rows": checks,
        },
        "summary": summarise(rows, done.get("sass", [])),
        "kernels": done.get("sass", []),
        "rows": rows,
    }


def make_session(arguments: argparse.Namespace) -> Session:
    """Return the session that the command line asks for."""
    smoke = arguments.smoke
    session = Session(
        device=torch.device("cpu" if arguments.device == "interpreter" else "cuda"),
        shapes=SMOKE_SHAPES if smoke else SHAPES,
        tokens=SMOKE_TOKENS if smoke else TOKENS,
        checked=SMOKE_TOKENS if smoke else CHECKED_TOKENS,
        rounds=2 if smoke else arguments.rounds,
        parts=arguments.parts or arguments.out / "parts",
        deadline=time.monotonic() + arguments.budget_s,
    )
    for folder in (arguments.out, session.parts):
        folder.mkdir(parents=True, exist_ok=True)
    return session


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything; return 1 where an integer differs from the reference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", type=Path, help="folder of finished parts [DIR/parts]")
    parser.add_argument("--device", choices=("cuda", "interpreter"), default="cuda")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--budget-s", type=float, default=540.0)
    parser.add_argument("--smoke", action="store_true", help="small shapes, two rounds")
    arguments = parser.parse_args(argv)
    session = make_session(arguments)
    if not session.emulated and not torch.cuda.is_available():
        sys.stderr.write("gpu_qlinear: no CUDA GPU. Run it on one, or with --device interpreter.\n")
        return 1
    environment = describe_gpu_environment()
    if not session.emulated:
        environment["compile_s"] = warm_up(session)
    with torch.no_grad():
        record = run_parts(session, arguments.out, environment)
    print_summary(record)
    return 1 if record["integers"]["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
