"""The load test of a Triton server: clients, what they met, one level of concurrency after another.

Every finished level is written at once. The same command keeps the levels without errors that are
there already; a record of another setup is refused, not mixed with and not overwritten.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import psutil

from treeq_export.artefacts import make_folder
from treeq_export.client.connection import Connection
from treeq_export.client.load_clients import Clients, OpenClient, PhaseResult
from treeq_export.client.load_memory import MemorySampler, find_process
from treeq_export.client.load_setup import LoadOptions, open_client, read_setup
from treeq_export.client.load_statistics import (
    latency_percentiles,
    subtract_counters,
    sum_counters,
)
from treeq_export.client.open import open_connection
from treeq_export.environment import available_cpus, describe_machine, version_of
from treeq_export.errors import PlanError, ServeError
from treeq_export.progress import OnStep
from treeq_export.reading import read_record
from treeq_export.records.base import load_record, save_record
from treeq_export.records.loadtest import (
    ClientCost,
    LoadLevel,
    LoadSetup,
    LoadTestRecord,
    MemoryTrace,
    ModelLoad,
)

RECORD_FILE = "loadtest.json"
FIGURE_FILE = "loadtest.png"
BUSY_CORES = "busy_cores"
_WARMUP_FROM = 2**40  # number of the first request of a warm-up, whose seeds no level has
_SETTLE_S = 1.0  # Triton counts an execution shortly after it has answered
_SETTLE_STEP_S = 0.05
_IDLE_LOOK_S = 0.5
_MAX_BUSY_CORES = 0.5  # while no client is sending
_MAX_CLIENT_CORES = 0.5
_MAX_MESSAGES = 20

Start = Callable[[str, bool], OnStep]  # level, kept -> callback of its fraction
Counters = dict[str, dict[str, int]]  # by model


def run_loadtest(
    options: LoadOptions, folder: Path, start: Start, *, fresh: bool = False
) -> LoadTestRecord:
    """Load a server at each number of clients, and write the record after each.

    Args:
        options: The load.
        folder: Gets loadtest.json.
        start: Called at the begin of each level.
        fresh: Whether a record that is there is replaced.

    Returns:
        The record; it ends early, with an incomplete level, where the clients gave up.

    Raises:
        ServeError: The server is unreachable, does not have the model, or answers not even the
            first request; or the record in the folder is of another setup.
        OutputError: The folder cannot be written to.
    """
    options.check()
    process = None if options.server_pid is None else find_process(options.server_pid)
    make_folder(folder)
    with open_connection(options.url, options.timeout_s) as connection:
        setup, info = read_setup(connection, options)
        record = _open_record(folder / RECORD_FILE, setup, fresh=fresh)
        connect = open_client(options, setup, info)
        with connect() as prepare:
            prepare(_WARMUP_FROM - 1)()
        for number in options.concurrency:
            name = f"{number} client{'s' if number > 1 else ''}"
            if any(_is_kept(level, number, process) for level in record.levels):
                start(name, True)
                continue
            level = _measure_level(connection, connect, setup, number, process, start(name, False))
            record = _with_level(record, level)
            save_record(folder / RECORD_FILE, record)
            if not level.complete:
                break
    return record


def read_loadtest(path: Path) -> LoadTestRecord:
    """Read a record.

    Raises:
        ServeError: Missing or malformed.
    """
    try:
        return load_record(path, LoadTestRecord, "loadtest")
    except PlanError as error:
        state = "malformed" if path.is_file() else "missing"
        raise ServeError(
            f"{path}: {state}, expected a record of `treeq-export loadtest`. Run it with "
            f"--out {path.parent}."
        ) from error


def find_doubts(record: LoadTestRecord) -> list[str]:
    """Return what speaks against a record's numbers, a sentence each.

    Args:
        record: A finished record.
    """
    doubts: list[str] = []
    busy = record.environment[BUSY_CORES]
    if busy > _MAX_BUSY_CORES:
        doubts.append(
            f"Other programs kept {busy:.1f} of {record.environment['cores']} cores busy at the "
            "begin: they disturb the times. Run it again with --fresh when they are done."
        )
    for level in record.levels:
        where = f"At concurrency {level.concurrency}"
        if level.client.cpu_share > _MAX_CLIENT_CORES:
            doubts.append(
                f"{where} the clients themselves took {level.client.cpu_share:.2f} of a core: "
                "the latencies hold their own waiting. Spread them over several load tests."
            )
        others = sum(model.num_requests for model in level.models[:1]) - level.num_requests
        if others > level.num_errors:
            doubts.append(
                f"{where} the server answered {others} requests more than this test sent: others "
                "use it. Run it again with --fresh when they are done."
            )
    return doubts


def _open_record(path: Path, setup: LoadSetup, *, fresh: bool) -> LoadTestRecord:
    """Return the record to go on with: what is there, if it is of the same setup."""
    environment = {
        **describe_machine(),
        "tritonclient": version_of("tritonclient"),
        BUSY_CORES: round(psutil.cpu_percent(_IDLE_LOOK_S) / 100 * available_cpus(), 2),
    }
    new = LoadTestRecord(setup=setup, environment=environment, levels=[])
    if fresh or not path.is_file():
        return new
    remedy = "Pass --fresh to replace it, or choose another --out."
    old = read_record(path, LoadTestRecord, error=ServeError, remedy=remedy)
    changes = _describe_changes(old, new)
    if changes:
        raise ServeError(
            f"{path}: of another setup: {changes}. Choose another --out, or pass --fresh to "
            "replace it."
        )
    return old


def _describe_changes(old: LoadTestRecord, new: LoadTestRecord) -> str:
    before, now = old.setup.model_dump(), new.setup.model_dump()
    for key in ("cpu", "cores"):
        before[key], now[key] = old.environment.get(key), new.environment[key]
    differences = [
        key if key in ("models", "config_sha256") else f"{key} {before[key]}, now {now[key]}"
        for key in now
        if before[key] != now[key]
    ]
    return ", ".join(differences)


def _is_kept(level: LoadLevel, concurrency: int, process: psutil.Process | None) -> bool:
    """Whether a level need not be measured again."""
    return (
        level.concurrency == concurrency
        and level.complete
        and not level.num_errors
        and (process is None or level.memory is not None)
    )


def _with_level(record: LoadTestRecord, level: LoadLevel) -> LoadTestRecord:
    others = [other for other in record.levels if other.concurrency != level.concurrency]
    levels = sorted([*others, level], key=lambda each: each.concurrency)
    return record.model_copy(update={"levels": levels})


def _measure_level(
    connection: Connection,
    connect: OpenClient,
    setup: LoadSetup,
    concurrency: int,
    process: psutil.Process | None,
    on_fraction: OnStep,
) -> LoadLevel:
    """Warm up, then let the clients send while counters and memory are watched."""
    warmup_s, duration_s = setup.warmup_s, setup.duration_s
    total_s = warmup_s + duration_s

    def tell(before_s: float) -> OnStep:
        return lambda seconds: on_fraction(min((before_s + seconds) / total_s, 0.99))

    with Clients(connect, concurrency) as clients:
        if warmup_s:
            _check_warmup(clients.run(warmup_s, _WARMUP_FROM, tell(0.0)), concurrency)
        before = _read_counters(connection, setup)
        with nullcontext() if process is None else MemorySampler(process) as memory:
            result = clients.run(duration_s, 0, tell(warmup_s))
        after = _read_counters(connection, setup)
    on_fraction(1.0)
    return make_level(
        concurrency,
        result,
        _subtract(before, after),
        None if memory is None else memory.trace(),
        answers_inside=setup.answers_inside,
    )


def _check_warmup(result: PhaseResult, concurrency: int) -> None:
    errors = [answer.error for answer in result.answers if answer.error is not None]
    if not result.complete:
        raise ServeError(
            f"the clients gave up in the warm-up of concurrency {concurrency}: {errors[-1]}",
            kind="failed",
        )


def make_level(
    concurrency: int,
    result: PhaseResult,
    models: Sequence[ModelLoad],
    memory: MemoryTrace | None,
    *,
    answers_inside: bool = True,
) -> LoadLevel:
    """Return what the clients met as a level of the record.

    Args:
        concurrency: Number of clients.
        result: Answers that the clients got.
        models: Counts of the server; empty if it could not be asked.
        memory: Memory of the server; None was not sampled.
        answers_inside: Whether Triton's time of the sampler is that of its requests.
    """
    latencies = [1e3 * answer.latency_s for answer in result.answers if answer.error is None]
    messages = [answer.error for answer in result.answers if answer.error is not None]
    total_ms = models[0].total_ms if models and answers_inside else None
    mean_ms = sum(latencies) / len(latencies) if latencies else None
    outside = None if total_ms is None or mean_ms is None else round(mean_ms - total_ms, 4)
    return LoadLevel(
        concurrency=concurrency,
        complete=result.complete,
        duration_s=round(result.duration_s, 4),
        num_requests=len(latencies),
        num_errors=len(messages),
        errors=count_messages(messages),
        images_per_s=round(len(latencies) / result.duration_s, 4) if result.duration_s else 0.0,
        **latency_percentiles(latencies),
        latencies_ms=[round(latency, 3) for latency in latencies],
        models=list(models),
        client=ClientCost(
            cpu_ms=round(1e3 * result.cpu_s / max(len(result.answers), 1), 4),
            cpu_share=round(result.cpu_s / result.duration_s, 4) if result.duration_s else 0.0,
            outside_ms=outside,
        ),
        memory=memory,
    )


def count_messages(messages: Sequence[str]) -> dict[str, int]:
    """Return how often each message was met, the most frequent first; the rare ones together.

    Example:
        >>> count_messages(["refused", "timeout", "refused"])
        {'refused': 2, 'timeout': 1}
    """
    counts: dict[str, int] = {}
    for message in messages:
        counts[message] = counts.get(message, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    kept, rest = dict(ordered[:_MAX_MESSAGES]), ordered[_MAX_MESSAGES:]
    if rest:
        kept[f"{len(rest)} other messages"] = sum(count for _, count in rest)
    return kept


def _read_counters(connection: Connection, setup: LoadSetup) -> Counters | None:
    """Return the models' counters once they stand still; no client is sending.

    Returns:
        None where the server does not say.
    """
    end = time.monotonic() + _SETTLE_S
    before: Counters | None = None
    with suppress(ServeError):
        while True:
            now = {
                model.name: sum_counters(connection.statistics(model.name))
                for model in setup.models
            }
            if now == before or time.monotonic() > end:
                return now
            before = now
            time.sleep(_SETTLE_STEP_S)
    return None


def _subtract(before: Counters | None, after: Counters | None) -> list[ModelLoad]:
    """Return what each model did; nothing where that is not known of all."""
    if before is None or after is None:
        return []
    loads = [subtract_counters(name, before[name], after[name]) for name in before]
    return [load for load in loads if load is not None] if all(loads) else []
