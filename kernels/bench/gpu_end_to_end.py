"""DiT-XL/2 end to end on a GPU: our kernels against PyTorch as an engineer would run it.

    python kernels/bench/gpu_end_to_end.py --out DIR [--budget-s 540]

A batch of b images with classifier-free guidance is 2 b rows. Contenders, each on its own copy of
the same random network:

    eager_<type>            PyTorch as it is, launched by the host
    graph_<type>            the same in a CUDA graph
    compile_<type>          torch.compile of every block, in a CUDA graph
    compile_max_bf16        the same with max-autotune
    <format>                our layers, the rest as it is, in a CUDA graph
    <format>_compile        our layers, the rest by torch.compile, in a CUDA graph

Blocks are compiled, not the whole: they are alike, so one compilation serves all 28. Every batch is
a part of its own that is not done again. `--device interpreter --smoke` runs a one-block network in
Triton's interpreter, measures nothing and says so.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

if "interpreter" in sys.argv:  # before treeq_gpu is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from gpu_models import DIT_XL_2, FORMATS, SMOKE, make_model, quantize_randomly, weight_bytes
from torch import Tensor

from treeq_export.artefacts import write_json
from treeq_export.bench.gpu_timing import (
    CudaTimer,
    EmulatedTimer,
    describe_gpu_environment,
    ratios,
    time_interleaved,
)
from treeq_export.errors import RunnerError
from treeq_export.model.zoo import DiTDenoiser
from treeq_export.reading import read_json
from treeq_export.runners.cuda_runner import GraphedModel, capture_graph

RECORD_FILE = "end_to_end.json"
BASELINES = ("compile_bf16", "compile_max_bf16", "graph_bf16", "eager_bf16")
BATCHES = (1, 4, 16)
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
OURS = torch.bfloat16
GUIDANCE_ROWS = 2
_TUNING_S = 200
_RECOMPILE_LIMIT = 256  # one a batch size and contender

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to run the network.

    Attributes:
        name: See the module's docstring.
        dtype: Of the network.
        fmt: Index into FORMATS; None is floating point.
        compile_mode: Mode of torch.compile; None does not compile.
        graphed: Whether it runs in a CUDA graph.
    """

    name: str
    dtype: torch.dtype
    fmt: int | None = None
    compile_mode: str | None = None
    graphed: bool = True

    @property
    def tunes(self) -> bool:
        """Whether its first call tries many kernels, which takes minutes."""
        return (self.compile_mode or "").startswith("max-autotune")


def list_contenders() -> list[Contender]:
    """Return all contenders; what compiles longest comes last."""
    found = []
    for name, dtype in TYPES.items():
        found += [
            Contender(f"eager_{name}", dtype, graphed=False),
            Contender(f"graph_{name}", dtype),
            Contender(f"compile_{name}", dtype, compile_mode="default"),
        ]
    for index, fmt in enumerate(FORMATS):
        found += [
            Contender(fmt.name, OURS, index),
            Contender(f"{fmt.name}_compile", OURS, index, "default"),
        ]
    mode = "max-autotune-no-cudagraphs"
    return [*found, Contender("compile_max_bf16", torch.bfloat16, compile_mode=mode)]


@dataclass
class Opened:
    """A contender on the device.

    Attributes:
        run: Takes the inputs.
        num_bytes: Of its parameters and buffers.
    """

    run: Callable[..., Tensor]
    num_bytes: int


def open_contender(contender: Contender, config: dict[str, Any], device: torch.device) -> Opened:
    """Return a contender on the device."""
    model = make_model(config, device, contender.dtype)
    if contender.fmt is not None:
        quantize_randomly(model, FORMATS[contender.fmt])
    if contender.compile_mode is not None:
        compile_blocks(model, contender.compile_mode)
    capture = capture_graph if contender.graphed and device.type == "cuda" else None
    return Opened(GraphedModel(model, capture), weight_bytes(model))


def compile_blocks(model: DiTDenoiser, mode: str) -> None:
    """Compile every block; falling back to eager after too many compilations is an error."""
    import torch._dynamo

    config: Any = torch._dynamo.config
    config.recompile_limit = config.accumulated_recompile_limit = _RECOMPILE_LIMIT
    config.fail_on_recompile_limit_hit = True
    blocks: Any = model.model.transformer_blocks
    for block in blocks:
        block.compile(mode=mode, dynamic=False, fullgraph=True)


def make_inputs(
    model: DiTDenoiser, rows: int, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Return the inputs of one call; the time stays float32."""
    example = model.make_example_inputs(rows, seed=0)
    types = (dtype, torch.float32, torch.int64)
    return [t.to(device, kind) for t, kind in zip(example.values(), types, strict=True)]


def time_batch(
    opened: dict[str, Opened],
    contenders: Sequence[Contender],
    inputs: dict[torch.dtype, list[Tensor]],
    batch: int,
    rounds: int,
    timer: Any,
    deadline: float,
) -> list[dict[str, Any]]:
    """Time the contenders at one batch size in one interleaved run.

    A contender that fails, for want of memory say, is named with the reason and left out; so is
    one that would be tuned for longer than there is time.
    """
    calls: dict[str, Call] = {}
    failed: list[dict[str, Any]] = []
    outputs: dict[str, Tensor] = {}
    prepared_s: dict[str, float] = {}
    for contender in contenders:
        run, arrays = opened[contender.name].run, inputs[contender.dtype]
        started = time.monotonic()
        if contender.tunes and deadline - started < _TUNING_S:
            reason = f"less than {_TUNING_S} s were left"
            failed.append({"target": contender.name, "batch": batch, "missing": reason})
            continue
        try:
            outputs[contender.name] = run(*arrays).float().clone()
        except (RuntimeError, RunnerError) as error:
            reason = " ".join(str(error).split())[:200]
            failed.append({"target": contender.name, "batch": batch, "missing": reason})
            continue
        prepared_s[contender.name] = time.monotonic() - started
        calls[contender.name] = lambda run=run, arrays=arrays: run(*arrays)
    times = time_interleaved(calls, timer, rounds=rounds, warmup=3)
    compared = {name: ratios(times, name) for name in BASELINES}
    rows = [
        {
            "target": name,
            "batch": batch,
            "rows": batch * GUIDANCE_ROWS,
            "median_ms": median(values) if values else None,
            "speedup": {base: found[name] for base, found in compared.items() if name in found},
            "finite": bool(outputs[name].isfinite().all()),
            "prepare_s": round(prepared_s[name], 2),
            "weight_bytes": opened[name].num_bytes,
            "all_times_ms": values,
        }
        for name, values in times.items()
    ]
    return rows + failed


def run_batches(
    arguments: argparse.Namespace, device: torch.device, environment: dict[str, Any]
) -> dict[str, Any]:
    """Time every batch that is not done yet; return the record of what there is."""
    deadline = time.monotonic() + arguments.budget_s
    parts = arguments.parts or arguments.out / "parts"
    config = SMOKE if arguments.smoke else DIT_XL_2
    batches = BATCHES[:1] if arguments.smoke else BATCHES
    contenders = list_contenders()
    if arguments.only:
        contenders = [c for c in contenders if c.name in arguments.only.split(",")]
    missing = [b for b in batches if not (parts / f"end_to_end_{b}.json").is_file()]
    opened: dict[str, Opened] = {}
    if missing:
        opened = {c.name: open_contender(c, config, device) for c in contenders}
    timer = EmulatedTimer() if device.type == "cpu" else CudaTimer(clear_l2=False)
    record: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    not_done: list[int] = []
    for batch in batches:
        path = parts / f"end_to_end_{batch}.json"
        if path.is_file():
            rows += read_json(path, error=RunnerError, remedy="Remove it.")
        elif time.monotonic() < deadline:
            size = config["sample_size"]
            shapes = DiTDenoiser(_Shapes(config), (config["in_channels"], size, size))
            inputs = {
                dtype: make_inputs(shapes, batch * GUIDANCE_ROWS, device, dtype)
                for dtype in TYPES.values()
            }
            found = time_batch(opened, contenders, inputs, batch, arguments.rounds, timer, deadline)
            write_json(path, found)
            rows += found
        else:
            not_done.append(batch)
        record = {
            "emulated": device.type == "cpu",
            "model": "DiT, one small block" if arguments.smoke else "DiT-XL/2, random weights",
            "config": config,
            "not_done": not_done,
            "environment": environment | {"rounds": arguments.rounds},
            "rows": rows,
        }
        write_json(arguments.out / RECORD_FILE, record)
    return record


class _Shapes(torch.nn.Module):
    """Stands for a model where only its example inputs are wanted."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config


def table(record: dict[str, Any]) -> list[str]:
    """Return the record as lines."""
    lines = [f"{'batch':>5} {'target':18} {'median ms':>10} {'over compile_bf16':>18}"]
    for row in record["rows"]:
        if "missing" in row:
            lines.append(f"{row['batch']:5} {row['target']:18} missing: {row['missing'][:80]}")
            continue
        ratio = row["speedup"].get("compile_bf16")
        shown = "-" if ratio is None else f"{ratio['ratio']:.2f}"
        time_ms = "untimed" if row["median_ms"] is None else f"{row['median_ms']:.3f}"
        lines.append(f"{row['batch']:5} {row['target']:18} {time_ms:>10} {shown:>18}")
    if record["not_done"]:
        lines.append(f"not done yet: batch {record['not_done']}. Run the same command again.")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Time everything and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", type=Path, help="folder of finished parts [DIR/parts]")
    parser.add_argument("--device", choices=("cuda", "interpreter"), default="cuda")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--budget-s", type=float, default=540.0)
    parser.add_argument("--only", help="contenders, separated by commas")
    parser.add_argument("--smoke", action="store_true", help="one small block")
    arguments = parser.parse_args(argv)
    device = torch.device("cpu" if arguments.device == "interpreter" else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("gpu_end_to_end: no CUDA GPU. Use one, or --device interpreter.\n")
        return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    environment = describe_gpu_environment()
    with torch.no_grad():
        record = run_batches(arguments, device, environment)
    sys.stdout.write("\n".join(table(record)) + "\n")
    return 0 if all(row.get("finite", True) for row in record["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
