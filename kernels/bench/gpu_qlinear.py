"""Check and time `treeq::QLinear` on a GPU, on the linears of DiT-XL/2.

First the integers are compared with the CPU reference over all shapes, formats and numbers of
tokens (gpu_check.py); then all contenders (gpu_contenders.py) are timed, one interleaved run per
shape and number of tokens (bench/gpu_timing.py); then the kernels that ran are read back as SASS.
"""

import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

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
from gpu_summary import summarise
from gpu_tensorrt import open_opponents
from treeq_gpu import choose
from treeq_gpu.launch import DTYPE_NAMES

from treeq_export.bench.gpu_timing import CudaTimer, EmulatedTimer, ratios, time_interleaved

DTYPE = torch.bfloat16
WARM_PROCESSES = 12


@dataclass
class Linears:
    """The linears that are checked and timed.

    Attributes:
        device: "cuda" or "cpu" (the interpreter).
        shapes: K, N by name.
        tokens: Numbers of tokens that are timed.
        checked: Numbers of tokens whose integers are compared.
        rounds: Counted rounds.
    """

    device: torch.device
    shapes: dict[str, tuple[int, int]]
    tokens: Sequence[int]
    checked: Sequence[int]
    rounds: int

    @property
    def emulated(self) -> bool:
        """Whether nothing is measured."""
        return self.device.type == "cpu"

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
        timer = EmulatedTimer() if self.emulated else CudaTimer()
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


def representatives(linears: Linears, num_sms: int) -> list[tuple[int, int, int, int]]:
    """Return (format index, K, N, M) such that every kernel is among them once."""
    found: dict[tuple[Any, ...], tuple[int, int, int, int]] = {}
    for index, fmt in enumerate(FORMATS):
        for k, n in linears.shapes.values():
            for m in sorted({*linears.tokens, *linears.checked}):
                how = choose.choose_qlinear(fmt.layer(k, n), m, num_sms, DTYPE_NAMES[DTYPE])
                key = (index, how[0].kernel.name, choose.shape_class_of(m, n, num_sms))
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


def warm_up(linears: Linears) -> float:
    """Compile all kernels in parallel; return how long that took, in seconds."""
    started = time.monotonic()
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    cases = representatives(linears, num_sms)
    with ProcessPoolExecutor(
        min(WARM_PROCESSES, len(cases)), mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        list(pool.map(warm_one, cases))
    return time.monotonic() - started


def measure(
    device: torch.device, rounds: int, environment: dict[str, Any], *, smoke: bool = False
) -> dict[str, Any]:
    """Check and time everything.

    Args:
        device: "cuda" or "cpu" (the interpreter).
        rounds: Counted rounds.
        environment: Description of the machine.
        smoke: Whether to take small shapes.

    Returns:
        The record, bench.json.
    """
    linears = Linears(
        device=device,
        shapes=SMOKE_SHAPES if smoke else SHAPES,
        tokens=SMOKE_TOKENS if smoke else TOKENS,
        checked=SMOKE_TOKENS if smoke else CHECKED_TOKENS,
        rounds=rounds,
    )
    if not linears.emulated:
        environment = environment | {"compile_s": warm_up(linears)}
    checks, rows = [], []
    for shape in linears.shapes:
        checks += linears.check(shape)
        sys.stderr.write(f"{shape}: integers compared\n")
    for shape in linears.shapes:
        rows += linears.time(shape)
        sys.stderr.write(f"{shape}: timed\n")
    kernels = linears.sass()
    return {
        "emulated": linears.emulated,
        "dtype": str(DTYPE).removeprefix("torch."),
        "shapes": linears.shapes,
        "tokens": list(linears.tokens),
        "rounds": rounds,
        "environment": environment,
        "integers": {"num_cases": len(checks), "failures": failures(checks), "rows": checks},
        "summary": summarise(rows, kernels),
        "kernels": kernels,
        "rows": rows,
    }
