"""What a load test will load: options, the models' configurations, and who sends the requests."""

import hashlib
import json
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from treeq_export.client.answers import ModelConfig, Statistics
from treeq_export.client.connection import Connection, check_timeout
from treeq_export.client.inputs import make_inputs, zero_conditioning
from treeq_export.client.load_clients import OpenClient, Prepare
from treeq_export.client.open import open_connection
from treeq_export.client.responses import sample
from treeq_export.client.sampler import SAMPLER, SamplerInfo, read_info
from treeq_export.errors import ServeError
from treeq_export.records.loadtest import LoadSetup, ServedModel

DENOISER = "denoiser"
_MAX_CLIENTS = 1024
_MAX_SEED = 2**62  # far enough from the end of int64 for all requests' numbers


@dataclass(frozen=True)
class LoadOptions:
    """What the caller asks for.

    Attributes:
        url: http://host:port or grpc://host:port.
        model: The sampler's name on the server.
        concurrency: Numbers of clients, one level each.
        duration_s: Seconds of each level.
        warmup_s: Before each level, uncounted.
        steps: Sent with each request; None leaves them to the server.
        guidance: Guidance scale sent with each request; None leaves it to the server.
        seed: Seed of the first request; each next one's is one more.
        note: For the record, such as what is emulated.
        server_pid: The server's process on this machine, whose memory is sampled.
        timeout_s: Longest time of one exchange.
    """

    url: str
    model: str = SAMPLER
    concurrency: tuple[int, ...] = (1, 2, 4, 8)
    duration_s: float = 30.0
    warmup_s: float = 3.0
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    note: str = ""
    server_pid: int | None = None
    timeout_s: float = 60.0

    def check(self) -> None:
        """Check what no server is needed for.

        Raises:
            ServeError: A value is out of range.
        """
        check_timeout(self.timeout_s)
        finite = math.isfinite(self.duration_s) and math.isfinite(self.warmup_s)
        clients = sorted(self.concurrency) or [0]
        for name, received, right, expected in (
            (
                "concurrency",
                ",".join(map(str, self.concurrency)),
                clients[0] >= 1 and clients[-1] <= _MAX_CLIENTS,
                f"numbers of clients in 1..{_MAX_CLIENTS}",
            ),
            ("duration", self.duration_s, finite and self.duration_s > 0, "more than 0 seconds"),
            ("warmup", self.warmup_s, finite and self.warmup_s >= 0, "0 seconds or more"),
            ("seed", self.seed, 0 <= self.seed <= _MAX_SEED, f"0..{_MAX_SEED}"),
        ):
            if not right:
                raise ServeError(
                    f"{name}: received {received}, expected {expected}. Repair the option.",
                    kind="refused",
                )


def read_setup(connection: Connection, options: LoadOptions) -> tuple[LoadSetup, SamplerInfo]:
    """Read from the server what is going to be loaded.

    Args:
        connection: Connection to `options.url`.
        options: The load that the caller asks for.

    Raises:
        ServeError: The server is unreachable or does not have the model, or that is no sampler.
    """
    info = read_info(connection, options.model)
    configs = {options.model: connection.model_config(options.model)}
    with suppress(ServeError):  # a server need not have one beside the sampler
        configs[DENOISER] = connection.model_config(DENOISER)
    models = [
        read_model(name, config, connection.statistics(name)) for name, config in configs.items()
    ]
    text = json.dumps(configs, sort_keys=True)
    setup = LoadSetup(
        url=connection.url,
        protocol=connection.address.scheme,
        model=info.model,
        mode=info.mode,
        target=info.target,
        answers_inside=info.mode == "inprocess" and not info.decoupled,
        models=models,
        config_sha256=hashlib.sha256(text.encode()).hexdigest(),
        output="image" if info.has_image else "latents",
        steps=info.steps if options.steps is None else options.steps,
        guidance=info.guidance if options.guidance is None else options.guidance,
        seed=options.seed,
        duration_s=options.duration_s,
        warmup_s=options.warmup_s,
        note=options.note,
    )
    return setup, info


def read_model(name: str, config: ModelConfig, statistics: Statistics) -> ServedModel:
    """Return what a model's configuration says about batches.

    Args:
        name: The model.
        config: JSON form of its configuration.
        statistics: JSON form of its statistics, which name its versions.
    """
    versions = [entry.get("version", "") for entry in statistics.get("model_stats", [])]
    batching = config.get("dynamic_batching")
    groups = config.get("instance_group", [])
    return ServedModel(
        name=name,
        version=max(versions, key=lambda text: (len(text), text), default=""),
        backend=config.get("platform") or config.get("backend") or "",
        max_batch=config.get("max_batch_size", 0),
        dynamic_batching=batching is not None,
        queue_delay_us=(batching or {}).get("max_queue_delay_microseconds", 0),
        num_instances=sum(group.get("count", 1) for group in groups) or 1,
    )


def open_client(options: LoadOptions, setup: LoadSetup, info: SamplerInfo) -> OpenClient:
    """Return what opens one client: a connection of its own that sends numbered requests.

    Args:
        options: The load that the caller asks for.
        setup: From `read_setup`.
        info: The sampler, from `read_setup`.

    Returns:
        Requests of one image; labels take turns, text inputs are zeros, every seed is another.
    """
    conditioning = zero_conditioning(info)

    @contextmanager
    def connect() -> Generator[Prepare]:
        with open_connection(options.url, options.timeout_s) as connection:

            def prepare(number: int) -> Callable[[], object]:
                inputs = make_inputs(
                    info,
                    label=number % info.num_classes if info.num_classes else None,
                    seed=options.seed + number,
                    steps=options.steps,
                    guidance=options.guidance,
                    conditioning=conditioning,
                )
                return lambda: sample(connection, info, inputs, [setup.output])

            yield prepare

    return connect
