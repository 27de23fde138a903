"""Load tests of a run served in all modes, its server overhead, and whether its memory grows.

    python samples/local_triton/loadtests.py runs/digits --python .triton/bin/python \
        --out samples/results/serving

For `inprocess` and `bls`, with dynamic batching and without, `treeq-export serve` writes a
repository, the real server (server.py, nothing emulated: the denoiser is in Triton's Python
backend) is started on it, and three things are measured:

    overhead   the same image over HTTP, over gRPC and by the direct runner in this process, in
               interleaved rounds (treeq_export/bench/timing.py), after the three have been found
               equal bit for bit
    sweep      latency, throughput and batches at 1, 2, 4, ... clients
    steady     the most clients for a long time, with the server's memory each second

serving.json holds every raw time, serving.png shows it. It is written after each repository, so the
same command goes on after an interruption. Exit status 1 if a request failed, an image differed, or
memory grew: the median of the last quarter of `steady` is more than 3 MB above that of the first.
That is ten times what was seen in a minute of 4500 images (digits, two cores: 0.1 MB inprocess,
0.3 MB bls), and less than 1 kB for each image between these medians in two minutes; a sampler that
was made to keep 2 kB of each request exceeded it in ten seconds.

ONNX Runtime has one thread (--threads) on both sides of the overhead: server, sampler and clients
share the machine's cores with it.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner
from matplotlib.axes import Axes
from numpy.typing import NDArray
from pydantic import ValidationError

from treeq_export.run_folder import RunFolder

sys.path.insert(0, str(Path(__file__).parent))
from server import Server, serve

from treeq_export.artefacts import sha256_of_file, write_bytes
from treeq_export.bench.timing import compare_times, time_rounds
from treeq_export.cli import main as treeq_export
from treeq_export.cli.console import StageProgress, say, stage_progress
from treeq_export.client.connection import Connection
from treeq_export.client.inputs import make_inputs
from treeq_export.client.load_setup import LoadOptions
from treeq_export.client.loadtest import find_doubts, run_loadtest
from treeq_export.client.loadtest_figure import draw_png
from treeq_export.client.open import open_connection
from treeq_export.client.responses import sample as sample_on_server
from treeq_export.client.sampler import read_info
from treeq_export.environment import describe_environment
from treeq_export.model.checkpoint import build_model
from treeq_export.model.conditioning import make_denoiser
from treeq_export.model.sampler import sample
from treeq_export.pipeline.workspace import Workspace
from treeq_export.records import Record
from treeq_export.records.loadtest import LoadTestRecord, describe_errors
from treeq_export.targets.table import open_way

RECORD_FILE, FIGURE_FILE = "serving.json", "serving.png"
VARIANTS = {
    "inprocess_batching": ("inprocess", True),
    "inprocess_single": ("inprocess", False),
    "bls_batching": ("bls", True),
    "bls_single": ("bls", False),
}
DIRECT, PROTOCOLS = "direct", ("http", "grpc")
SEED, LABEL, LABELS = 1, 7, "class_labels"
WARMUP_S = 3.0
WARMUP_ROUNDS = 3
GROWTH_LIMIT_BYTES = 3_000_000


class Overhead(Record):
    """What a request costs beyond the sampling itself.

    Attributes:
        equal: Whether the server's samples equal the direct runner's bit for bit, by protocol.
        times_ms: Raw wall times of the rounds, of "direct", "http" and "grpc".
        median_ms: Their medians.
        overhead_ms: Median less the direct one's, by protocol.
        ratio: Median over the direct one's, with its 95 % interval: ratio, low, high.
    """

    equal: dict[str, bool]
    times_ms: dict[str, list[float]]
    median_ms: dict[str, float]
    overhead_ms: dict[str, float]
    ratio: dict[str, tuple[float, float, float]]


class Part(Record):
    """One repository's measurements, and the options that they were made with."""

    options: dict[str, Any]
    overhead: Overhead
    sweep: LoadTestRecord
    steady: LoadTestRecord


class ServingRecord(Record):
    """Content of serving.json; `failures` is empty where all is well."""

    environment: dict[str, Any]
    growth_limit_bytes: int
    parts: dict[str, Part]
    failures: list[str]


def main() -> None:
    """Measure, write the record and the picture, say what is wrong."""
    options = parse_options()
    wanted = {key: value for key, value in vars(options).items() if not isinstance(value, Path)}
    wanted["plan_sha256"] = sha256_of_file(options.run / RunFolder.PLAN)
    environment = describe_environment(options.threads)
    record = ServingRecord(
        environment=environment,
        growth_limit_bytes=GROWTH_LIMIT_BYTES,
        parts=read_parts(options.out / RECORD_FILE, wanted),
        failures=[],
    )
    with stage_progress() as progress:
        for name in VARIANTS:
            say(f"{name}: up to date" if name in record.parts else name)
            if name not in record.parts:
                with tempfile.TemporaryDirectory(prefix="treeq-loadtests-") as folder:
                    part = measure(name, options, wanted, Path(folder), progress)
                record = with_part(record, name, part)
                write_bytes(options.out / RECORD_FILE, f"{record.model_dump_json()}\n".encode())
    parts = record.parts
    picture = draw_png(
        [(name, part.sweep) for name, part in parts.items()],
        [(name, part.steady) for name, part in parts.items()],
        lambda axes, colors: draw_overhead(axes, colors, list(parts.values())),
    )
    write_bytes(options.out / FIGURE_FILE, picture)
    for name, part in parts.items():
        print(describe_part(name, part))
        for doubt in (*find_doubts(part.sweep), *find_doubts(part.steady)):
            say(f"{name}: {doubt}")
    for failure in record.failures:
        say(f"FAILED {failure}")
    sys.exit(1 if record.failures else 0)


def read_parts(path: Path, wanted: dict[str, Any]) -> dict[str, Part]:
    """Return what is there already: parts without failures, of equal options."""
    try:
        parts = ServingRecord.model_validate_json(path.read_bytes()).parts
    except (OSError, ValidationError):  # not there, or of an older form
        return {}
    return {
        name: part
        for name, part in parts.items()
        if part.options == wanted and not find_failures(name, part)
    }


def with_part(record: ServingRecord, name: str, part: Part) -> ServingRecord:
    """Return the record with one more part, in the order of VARIANTS."""
    known = {**record.parts, name: part}
    parts = {each: known[each] for each in VARIANTS if each in known}
    failures = [line for each, part in parts.items() for line in find_failures(each, part)]
    return record.model_copy(update={"parts": parts, "failures": failures})


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="A finished run, such as runs/digits.")
    parser.add_argument("--python", type=Path, required=True, help="Of the server's environment.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", default="ort")
    parser.add_argument("--duration", type=float, default=120.0, help="Seconds of `steady`.")
    parser.add_argument("--clients", type=int, default=8, help="Of `steady`; the sweep ends there.")
    parser.add_argument("--sweep-duration", type=float, default=20.0, help="Seconds of a level.")
    parser.add_argument("--rounds", type=int, default=40, help="Of the overhead.")
    parser.add_argument("--threads", type=int, default=1, help="Of ONNX Runtime, everywhere.")
    return parser.parse_args()


def measure(
    name: str,
    options: argparse.Namespace,
    wanted: dict[str, Any],
    scratch: Path,
    progress: StageProgress,
) -> Part:
    """Write a repository, start the server on it, and measure."""
    mode, batching = VARIANTS[name]
    repository = scratch / "triton"
    write_repository(options, repository, mode, batching=batching)
    sweep = tuple(2**power for power in range(options.clients.bit_length()))

    def load(part: str, server: Server, **changes: Any) -> LoadTestRecord:
        def start(level: str, kept: bool) -> Callable[[float], None]:
            return progress.start(f"{part}, {level}", kept)

        plan = LoadOptions(
            f"http://{server.http}",
            warmup_s=WARMUP_S,
            server_pid=server.process.pid,
            note="real server, Python backend; nothing emulated",
            **changes,
        )
        return run_loadtest(plan, scratch / part, start)

    with serve(repository, options.python) as server:
        return Part(
            options=wanted,
            overhead=measure_overhead(server, options, progress.start("overhead", False)),
            sweep=load("sweep", server, concurrency=sweep, duration_s=options.sweep_duration),
            steady=load(
                "steady", server, concurrency=(options.clients,), duration_s=options.duration
            ),
        )


def write_repository(
    options: argparse.Namespace, repository: Path, mode: str, *, batching: bool
) -> None:
    """Call `treeq-export serve` with the options that a user would give.

    Raises:
        SystemExit: It refuses.
    """
    arguments = [
        *("serve", "--run", options.run, "--out", repository, "--target", options.target),
        *("--mode", mode, "--backend", "python", "--threads", options.threads),
        "--dynamic-batching" if batching else "--no-dynamic-batching",
    ]
    result = CliRunner().invoke(treeq_export, [str(argument) for argument in arguments])
    if result.exit_code:
        raise SystemExit(f"serve --mode {mode}: {result.output.strip()}")


@contextmanager
def open_direct(options: argparse.Namespace) -> Iterator[Callable[[], NDArray[np.float32]]]:
    """Open the direct runner in this process; yields what samples one image with it."""
    torch.set_num_threads(1)  # as in the server's sampler
    with Workspace.reopen(options.run) as workspace:
        checkpoint, recipe = workspace.checkpoint, workspace.recipe
        denoiser = make_denoiser(build_model(checkpoint), checkpoint, recipe.model)
    conditioning = {LABELS: torch.tensor([LABEL])}
    with open_way(options.run, options.target, threads=options.threads) as runner:
        yield lambda: sample(
            lambda inputs: torch.from_numpy(runner.run(inputs)),
            denoiser,
            recipe.sampler,
            num=1,
            seed=SEED,
            conditioning=conditioning,
        ).numpy()


def measure_overhead(
    server: Server, options: argparse.Namespace, on_fraction: Callable[[float], None]
) -> Overhead:
    """Time the same image by the direct runner and over both protocols, in interleaved rounds."""
    turns = 0
    num_turns = 3 * (options.rounds + WARMUP_ROUNDS)

    def on_turn() -> None:
        nonlocal turns
        turns += 1
        on_fraction(turns / num_turns)

    with (
        open_direct(options) as direct,
        open_connection(f"http://{server.http}") as http,
        open_connection(f"grpc://{server.grpc}") as grpc,
    ):
        calls = {DIRECT: direct, "http": request_of(http), "grpc": request_of(grpc)}
        wanted = direct()
        equal = {name: np.array_equal(calls[name](), wanted) for name in PROTOCOLS}
        times = time_rounds(calls, rounds=options.rounds, warmup=WARMUP_ROUNDS, on_turn=on_turn)
    medians = {name: median(values) for name, values in times.items()}
    ratios = {name: compare_times(times[name], times[DIRECT], seed=0) for name in PROTOCOLS}
    return Overhead(
        equal=equal,
        times_ms={name: [round(value, 4) for value in values] for name, values in times.items()},
        median_ms={name: round(value, 4) for name, value in medians.items()},
        overhead_ms={name: round(medians[name] - medians[DIRECT], 4) for name in PROTOCOLS},
        ratio={name: (each.ratio, each.low, each.high) for name, each in ratios.items()},
    )


def request_of(connection: Connection) -> Callable[[], NDArray[np.float32]]:
    """Return what asks a server for the image that the direct runner samples."""
    info = read_info(connection)
    inputs = make_inputs(info, label=LABEL, seed=SEED)
    return lambda: sample_on_server(connection, info, inputs, ["latents"]).arrays["latents"]


def find_failures(name: str, part: Part) -> list[str]:
    """Return what is wrong with a repository's measurements, a line each."""
    failures = [
        f"{name}: the image over {protocol} differs from the direct runner's"
        for protocol, equal in part.overhead.equal.items()
        if not equal
    ]
    for kind, record in (("sweep", part.sweep), ("steady", part.steady)):
        errors = describe_errors(record.levels)
        if errors is not None:
            failures.append(f"{name}, {kind}: {errors}")
    for level in part.steady.levels:
        growth = None if level.memory is None else level.memory.growth_bytes
        if growth is None:
            failures.append(f"{name}: too few samples of memory. Raise --duration.")
        elif growth > GROWTH_LIMIT_BYTES:
            failures.append(
                f"{name}: memory grew by {growth / 1e6:.1f} MB, expected at most "
                f"{GROWTH_LIMIT_BYTES / 1e6:g} MB"
            )
    return failures


def describe_part(name: str, part: Part) -> str:
    """Return a repository's results in one line."""
    overhead = part.overhead
    costs = ", ".join(
        f"{protocol} +{overhead.overhead_ms[protocol]:.2f} ms ({overhead.ratio[protocol][0]:.3f}x)"
        for protocol in PROTOCOLS
    )
    level = part.steady.levels[-1]
    latencies = "/".join(
        f"{value or 0:.1f}" for value in (level.p50_ms, level.p90_ms, level.p99_ms)
    )
    batches = ", ".join(
        f"{model.average_batch:.2f} {model.name}" for model in level.models if model.average_batch
    )
    growth = 0.0 if level.memory is None else (level.memory.growth_bytes or 0.0)
    return (
        f"{name}: direct {overhead.median_ms[DIRECT]:.2f} ms, {costs}; {level.concurrency} "
        f"clients: p50/p90/p99 {latencies} ms, {level.images_per_s:.1f} images/s, batch "
        f"{batches}, {level.num_requests} requests, {level.num_errors} errors, memory "
        f"{growth / 1e6:+.2f} MB"
    )


def draw_overhead(axes: Axes, colors: Sequence[str], parts: Sequence[Part]) -> None:
    """Draw a request's extra time of every repository, over HTTP (filled) and gRPC."""
    width = 0.38
    for at, (part, color) in enumerate(zip(parts, colors, strict=True)):
        for side, protocol in enumerate(PROTOCOLS):
            value = part.overhead.overhead_ms[protocol]
            place = at + (side - 0.5) * width
            face = color if protocol == "http" else "none"
            axes.bar(place, value, width * 0.9, facecolor=face, edgecolor=color)
            axes.annotate(
                f"{value:.1f}",
                (place, max(value, 0.0)),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    direct = median(part.overhead.median_ms[DIRECT] for part in parts)
    axes.set_title(
        f"One request at a time, beyond the direct runner's {direct:.1f} ms:\n"
        "HTTP filled, gRPC open; medians of interleaved rounds"
    )
    axes.set_ylabel("ms")
    axes.set_xticks([])
    axes.set_ylim(top=axes.get_ylim()[1] * 1.15)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server is stopped too
    main()
