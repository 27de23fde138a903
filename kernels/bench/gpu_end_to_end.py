"""DiT-XL/2 end to end on a GPU: our kernels against PyTorch as an engineer would run it.

A batch of b images with classifier-free guidance is 2 b rows. Contenders, each on its own copy of
the same random network:

    eager_<type>            PyTorch as it is, launched by the host
    graph_<type>            the same in a CUDA graph
    compile_<type>          torch.compile of every block, in a CUDA graph
    compile_max_bf16        the same with max-autotune, which tries many kernels for minutes
    <format>                our layers, the rest as it is, in a CUDA graph
    <format>_compile        our layers, the rest by torch.compile, in a CUDA graph

Blocks are compiled, not the whole: they are alike, so one compilation serves all 28.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from gpu_models import DIT_XL_2, FORMATS, SMOKE, make_model, quantize_randomly, weight_bytes
from torch import Tensor

from treeq_export.bench.gpu_timing import CudaTimer, EmulatedTimer, ratios, time_interleaved
from treeq_export.errors import RunnerError
from treeq_export.model.families.dit import LABELS, DiTDenoiser
from treeq_export.runners.cuda_runner import GraphedModel, capture_graph

BASELINES = ("compile_bf16", "compile_max_bf16", "graph_bf16", "eager_bf16")
BATCHES = (1, 4, 16)
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
OURS = torch.bfloat16
GUIDANCE_ROWS = 2
_RECOMPILE_LIMIT = 256  # one a batch size and contender

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to run the network.

    Attributes:
        name: See the module's docstring.
        dtype: Type of the network.
        fmt: Index into FORMATS; None is floating point.
        compile_mode: Mode of torch.compile; None does not compile.
        graphed: Whether it runs in a CUDA graph.
    """

    name: str
    dtype: torch.dtype
    fmt: int | None = None
    compile_mode: str | None = None
    graphed: bool = True


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
        num_bytes: Bytes of its parameters and buffers.
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
) -> list[dict[str, Any]]:
    """Time the contenders at one batch size in one interleaved run.

    A contender that fails, for want of memory say, is named with the reason and left out.
    """
    calls: dict[str, Call] = {}
    failed: list[dict[str, Any]] = []
    outputs: dict[str, Tensor] = {}
    prepared_s: dict[str, float] = {}
    for contender in contenders:
        run, arrays = opened[contender.name].run, inputs[contender.dtype]
        started = time.monotonic()
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


def measure(
    device: torch.device,
    rounds: int,
    environment: dict[str, Any],
    *,
    smoke: bool = False,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Time every batch.

    Args:
        device: "cuda" or "cpu" (the interpreter).
        rounds: Counted rounds.
        environment: Description of the machine.
        smoke: Whether to take a network of one small block.
        only: Contenders; empty takes all.

    Returns:
        The record, end_to_end.json.
    """
    config = SMOKE if smoke else DIT_XL_2
    contenders = [c for c in list_contenders() if not only or c.name in only]
    opened = {c.name: open_contender(c, config, device) for c in contenders}
    timer = EmulatedTimer() if device.type == "cpu" else CudaTimer(clear_l2=False)
    size = config["sample_size"]
    shapes = DiTDenoiser(_Shapes(config), (config["in_channels"], size, size), LABELS)
    rows: list[dict[str, Any]] = []
    for batch in BATCHES[:1] if smoke else BATCHES:
        inputs = {
            dtype: make_inputs(shapes, batch * GUIDANCE_ROWS, device, dtype)
            for dtype in TYPES.values()
        }
        rows += time_batch(opened, contenders, inputs, batch, rounds, timer)
        sys.stderr.write(f"batch {batch}: timed\n")
    return {
        "emulated": device.type == "cpu",
        "model": "DiT, one small block" if smoke else "DiT-XL/2, random weights",
        "config": config,
        "environment": environment | {"rounds": rounds},
        "rows": rows,
    }


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
    return lines
