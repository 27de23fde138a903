"""Record of a load test of a Triton server: loadtest.json.

Percentiles are numpy's (linear between the two nearest of the sorted latencies). What Triton counts
(executions, batches, times in queue and in models) is the difference of its statistics extension
between just before a level's first request and just after its last answer.
"""

from collections.abc import Sequence
from typing import Any

from treeq_export.records.base import Record


class ServedModel(Record):
    """A model as its configuration on the server says.

    Attributes:
        name: On the server.
        version: The version that serves, the highest where there are several.
        backend: Or its platform: "python", "onnxruntime_onnx", "tensorrt_plan".
        max_batch: Largest batch of a request or of merged requests.
        dynamic_batching: Whether Triton merges requests.
        queue_delay_us: How long it waits for others to merge with; 0 without dynamic batching.
        num_instances: Instances of the model.
    """

    name: str
    version: str
    backend: str
    max_batch: int
    dynamic_batching: bool
    queue_delay_us: int
    num_instances: int


class LoadSetup(Record):
    """All that has to be equal for two levels to belong to one record.

    Attributes:
        url: Address of the server, without credentials.
        protocol: "http" or "grpc".
        model: Name of what was exported.
        mode: Mode of the sampler: "inprocess" or "bls".
        target: Compiled target that runs.
        answers_inside: Whether the sampler answers before its execution ends, so that Triton's
            times are those of its requests; not in mode bls, nor where it streams: there its
            threads answer later, which Triton does not time.
        models: The sampler first, then the denoiser where the server has it as a model.
        config_sha256: Digest of the configurations of these models.
        output: Name of the output that was asked for.
        steps: Solver steps of each image.
        guidance: Guidance scale of each image.
        seed: Seed of the first request; the next request takes the next seed.
        duration_s: How long the clients send, of each level.
        warmup_s: The same before it, uncounted.
        note: Remark of the user, such as what was emulated.
    """

    url: str
    protocol: str
    model: str
    mode: str
    target: str
    answers_inside: bool
    models: list[ServedModel]
    config_sha256: str
    output: str
    steps: int
    guidance: float
    seed: int
    duration_s: float
    warmup_s: float
    note: str


class ModelLoad(Record):
    """What one model did during a level, by Triton's own statistics.

    Attributes:
        name: The model.
        num_requests: Requests that it answered, of the clients or of the sampler.
        num_failed: Requests that it failed.
        num_inferences: Rows of all batches.
        num_executions: Batches.
        average_batch: Rows per batch; None where it was not executed.
        total_ms: Mean time of a request from its arrival in Triton to the end of its execution;
            see `LoadSetup.answers_inside`.
        queue_ms: Mean time of a request in the queue.
        compute_ms: Mean time of a request's execution, its batch's inputs and outputs included.
    """

    name: str
    num_requests: int
    num_failed: int
    num_inferences: int
    num_executions: int
    average_batch: float | None
    total_ms: float | None
    queue_ms: float | None
    compute_ms: float | None


class ClientCost(Record):
    """What the load test itself took.

    Attributes:
        cpu_ms: Processor time of the client's process per request.
        cpu_share: The same over the duration, in cores; with one core it would be the bottleneck.
        outside_ms: Mean latency less Triton's own time of a request (`ModelLoad.total_ms` of the
            sampler): the client's encoding, the network and the server's reading and writing. Less
            than that where requests are merged, since the first answers leave before their batch's
            execution ends. None where Triton does not time it.
    """

    cpu_ms: float
    cpu_share: float
    outside_ms: float | None


class MemoryTrace(Record):
    """Memory of the server's process and all its descendants while a level ran.

    Attributes:
        kind: What `bytes` holds. "own": anonymous pages and shared memory, a page that n processes
            share as 1/n of each; pages of files (libraries, mapped weights) are left out, because
            the share of those changes with every other program that maps the same file. "rss"
            where the system does not tell these apart; shared pages then count once per process.
        seconds: When each sample was taken, after the level's begin.
        bytes: Sum over the processes.
        pss_bytes: The same with the pages of files; empty where the system does not say.
        num_processes: How many there were.
        slope_mb_per_min: Slope of `bytes`, least squares through the second half of the time;
            None with fewer than two samples there. 1 MB is 1e6 bytes.
        growth_bytes: Median of the last quarter of `bytes` less that of the first; None with fewer
            than four samples.
        growth_fraction: The same over the first quarter's median.
    """

    kind: str
    seconds: list[float]
    bytes: list[int]
    pss_bytes: list[int]
    num_processes: list[int]
    slope_mb_per_min: float | None
    growth_bytes: float | None
    growth_fraction: float | None


class LoadLevel(Record):
    """What one number of closed-loop clients met.

    Attributes:
        concurrency: Clients; each sends its next request when it has its answer.
        complete: Whether all of them went on to the end; False where they gave up on the server.
        duration_s: From the first request to the last answer.
        num_requests: Answered requests of one image each.
        num_errors: Failed ones.
        errors: Message to how often it was met.
        images_per_s: num_requests / duration_s.
        p50_ms: Percentiles of the answered requests; None where there are none.
        latencies_ms: All of them, in the order in which the requests were sent.
        models: The sampler, and the denoiser where it is a model of the server; empty where the
            server had died, or a model had been loaded again.
        client: The load test's own part.
        memory: None where no server process was named.
    """

    concurrency: int
    complete: bool
    duration_s: float
    num_requests: int
    num_errors: int
    errors: dict[str, int]
    images_per_s: float
    p50_ms: float | None
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    max_ms: float | None
    latencies_ms: list[float]
    models: list[ModelLoad]
    client: ClientCost
    memory: MemoryTrace | None


class LoadTestRecord(Record):
    """Result of a load test; one level per number of clients, ascending.

    Attributes:
        setup: What was loaded, and how.
        environment: The client's machine when the first level began; its "busy_cores" is how many
            cores were at work then, before any client was.
        levels: What is finished.
    """

    setup: LoadSetup
    environment: dict[str, Any]
    levels: list[LoadLevel]


def describe_errors(levels: Sequence[LoadLevel]) -> str | None:
    """Return what failed in one line, None where nothing did.

    Args:
        levels: Levels of a record.

    Returns:
        Counts, clients and the most frequent message of the first level that failed.
    """
    bad = [level for level in levels if level.num_errors or not level.complete]
    if not bad:
        return None
    num_errors = sum(level.num_errors for level in levels)
    num_all = num_errors + sum(level.num_requests for level in levels)
    counts = sorted(bad[0].errors.items(), key=lambda item: -item[1])
    first = f"{counts[0][0]} ({counts[0][1]}x)" if counts else "no message"
    others = "" if len(counts) < 2 else f", and {len(counts) - 1} more kinds of message"
    return (
        f"{num_errors} of {num_all} requests failed, first at concurrency "
        f"{bad[0].concurrency}: {first}{others}"
    )
