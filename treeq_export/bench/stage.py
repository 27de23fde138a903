"""Running the bench: which targets there are, their times, their memory, the record."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from numpy.typing import NDArray

from treeq_export.bench.memory import measure_memory
from treeq_export.bench.peer import make_int8_peer
from treeq_export.bench.timing import compare_times, time_rounds
from treeq_export.environment import describe_environment, warn_if_busy
from treeq_export.errors import PlanError, RunnerError
from treeq_export.model.zoo import Denoiser
from treeq_export.progress import OnStep, Say, say_nothing
from treeq_export.recipe import BenchSection, ModelSection
from treeq_export.records import BenchMemory, BenchRecord, BenchRow, Speedup, save_record
from treeq_export.run_folder import RunFolder
from treeq_export.runners.torch_runner import TorchRunner
from treeq_export.runners.ways import Way
from treeq_export.targets import names
from treeq_export.targets.table import way_named

TORCH = "torch_fp32"
FP32 = "ort_fp32"
PEER = "ort_int8"
NUM_CALIBRATION_BATCHES = 4

Inputs = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class _Side:
    """One target of the bench.

    Attributes:
        open: Returns the runner, which is then entered.
        load: The order to the process that measures memory; None where none is started.
    """

    open: Callable[[], AbstractContextManager[Any]]
    load: dict[str, Any] | None


def run_bench(
    run: Path,
    denoiser: Denoiser,
    section: BenchSection,
    *,
    targets: Sequence[str],
    seed: int,
    on_step: OnStep,
    model: ModelSection | None = None,
    say: Say = say_nothing,
) -> BenchRecord:
    """Time every target, measure its memory, and write `bench.json`.

    Args:
        run: The run folder, with `onnx/<target>/model.onnx` of compile.
        denoiser: The full-precision model.
        section: Batch sizes, rounds and threads.
        targets: "torch_fp32", "ort_fp32", "ort_int8" (the peer, made here) or compiled targets.
        seed: Seed of the inputs and of the bootstrap.
        on_step: Called with the fraction done, 0..1.
        model: The recipe's model section; torch_fp32's memory is measured only where it is given,
            because its process loads the checkpoint anew.
        say: Called with one line where a cached graph is damaged.

    Returns:
        The record: all raw times, memory, ratios with intervals, the environment.

    Raises:
        PlanError: A compiled graph is missing; names `compile`.
        RunnerError: A runtime fails, or its output has another shape than the other targets'.
        OutputError: The folder cannot be written to.
    """
    environment = describe_environment(section.threads)
    warn_if_busy(environment)
    environment |= {"rounds": section.rounds, "warmup": section.warmup, "seed": seed}
    example = _example_inputs(denoiser, section.batch_sizes[0], seed)
    sides = _find_sides(run, denoiser, targets, section, seed, model, say)
    advance = _make_progress(
        len(targets) * (len(section.batch_sizes) * (section.warmup + section.rounds) + 1), on_step
    )
    rows: list[BenchRow] = []
    with ExitStack() as stack:
        runners = {name: stack.enter_context(side.open()) for name, side in sides.items()}
        for batch in section.batch_sizes:
            inputs = _example_inputs(denoiser, batch, seed)
            rows += _time_batch(runners, inputs, batch, section, advance)
    memory: list[BenchMemory] = []
    for target, side in sides.items():
        if side.load is not None:
            memory.append(measure_memory(target, side.load, example, section.threads))
        advance()
    record = BenchRecord(
        rows=rows, memory=memory, speedups=compare_rows(rows, seed), environment=environment
    )
    save_record(run / RunFolder.BENCH, record)
    return record


def compare_rows(rows: Sequence[BenchRow], seed: int) -> list[Speedup]:
    """Return every target's ratio to each of its baselines that was timed.

    Baselines are ort_fp32 and torch_fp32, and ort_int8 for targets of ours.

    Args:
        rows: Times, the same rounds for all rows of a batch.
        seed: Seed of the bootstrap.
    """
    speedups: list[Speedup] = []
    for row in rows:
        baselines = (FP32, TORCH) if row.target in (FP32, TORCH, PEER) else (FP32, TORCH, PEER)
        for other in rows:
            if other.batch != row.batch or other.target not in baselines or other is row:
                continue
            ratio = compare_times(other.all_times_ms, row.all_times_ms, seed)
            speedups.append(
                Speedup(
                    target=row.target,
                    baseline=other.target,
                    batch=row.batch,
                    ratio=ratio.ratio,
                    low=ratio.low,
                    high=ratio.high,
                )
            )
    return speedups


def _find_sides(
    run: Path,
    denoiser: Denoiser,
    targets: Sequence[str],
    section: BenchSection,
    seed: int,
    model: ModelSection | None,
    say: Say,
) -> dict[str, _Side]:
    """Return how every target is opened and loaded; the peer is made where needed."""
    sides: dict[str, _Side] = {}
    for target in targets:
        if target == TORCH:
            load = None if model is None else {"torch": model.model_dump(mode="json")}
            sides[target] = _Side(partial(TorchRunner, denoiser, threads=section.threads), load)
            continue
        way = Way(target, names.FP32) if target in (FP32, PEER) else way_named(target)
        path = run.absolute() / RunFolder.graph(way.target)
        if not path.is_file():
            raise PlanError(
                f"{path}: missing; target {target} needs it. "
                f"Run `treeq-export compile --run {run}` first."
            )
        if target == PEER:
            batches = range(NUM_CALIBRATION_BATCHES)
            calibration = [_example_inputs(denoiser, 2, seed + batch) for batch in batches]
            folder = (run.absolute() / RunFolder.graph(PEER)).parent
            path = make_int8_peer(path, folder, calibration, say)
        opened = partial(way.open, path, threads=section.threads, spin=True)
        sides[target] = _Side(opened, {"onnx": str(path), "options": way.options(path)})
    return sides


def _example_inputs(denoiser: Denoiser, batch: int, seed: int) -> Inputs:
    return {
        name: value.numpy() for name, value in denoiser.make_example_inputs(batch, seed).items()
    }


def _make_progress(total: int, on_step: OnStep) -> Callable[[], None]:
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        on_step(done / total)

    return advance


def _time_batch(
    runners: Mapping[str, Any],
    inputs: Inputs,
    batch: int,
    section: BenchSection,
    advance: Callable[[], None],
) -> list[BenchRow]:
    """Check that all targets return the same shape, then time them."""
    shapes = {target: runner.run(inputs).shape for target, runner in runners.items()}
    first, expected = next(iter(shapes.items()))
    for target, shape in shapes.items():
        if shape != expected:
            raise RunnerError(
                f"{target}: returned shape {shape} at batch {batch}, expected {expected} as "
                f"{first}. Compile the target again."
            )
    calls = {
        target: (lambda runner=runner: runner.run(inputs)) for target, runner in runners.items()
    }
    times = time_rounds(calls, rounds=section.rounds, warmup=section.warmup, on_turn=advance)
    return [
        BenchRow(
            target=target, batch=batch, median_ms=median(times[target]), all_times_ms=times[target]
        )
        for target in runners
    ]
