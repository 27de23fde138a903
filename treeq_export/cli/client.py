"""`treeq-export client`, `health` and `web`: the other side of a Triton server."""

import json
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from treeq_export.cli.console import json_option, main, say, sendable, stderr
from treeq_export.errors import ServeError

if TYPE_CHECKING:
    from treeq_export.client.connection import Connection
    from treeq_export.client.images import ImageOrder
    from treeq_export.client.sampler import SamplerInfo
    from treeq_export.records.health import HealthRecord
    from treeq_export.records.images import ImagesRecord

_MAX_INTERVAL_S = 86400.0

url_option = click.option(
    "--url",
    default="http://localhost:8000",
    show_default=True,
    help="Server address: http://host:port or grpc://host:port.",
)
model_option = click.option(
    "--model",
    default="sampler",
    show_default=True,
    callback=sendable,
    help="The sampler's name on the server.",
)
timeout_option = click.option(
    "--timeout",
    "timeout_s",
    type=float,
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Longest time from a request to the end of its answer, in seconds.",
)


def _interval(
    _context: click.Context, _option: click.Parameter, seconds: float | None
) -> float | None:
    if seconds is not None and not 0 < seconds <= _MAX_INTERVAL_S:
        raise click.BadParameter(
            f"{seconds:g}: expected more than 0 and at most {_MAX_INTERVAL_S:g}."
        )
    return seconds


conditioning_option = click.option(
    "--conditioning",
    type=click.Path(path_type=Path),
    help="Safetensors file with embedded prompts, for a text-conditional model.",
)


@main.command()
@url_option
@model_option
@click.option("--label", type=int, help="Class number, for a class-conditional model.")
@conditioning_option
@click.option("--prompt", type=int, default=0, show_default=True, help="Row of --conditioning.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first image.")
@click.option(
    "--num",
    type=int,
    default=1,
    show_default=True,
    help="Number of images; each takes the next seed.",
)
@click.option("--steps", type=int, help="Solver steps  [default: the server's]")
@click.option("--guidance", type=float, help="Guidance scale  [default: the server's]")
@click.option(
    "--out", type=click.Path(path_type=Path), help="PNG file; several images get .seedN.png."
)
@click.option("--scale", type=int, help="Factor to enlarge by  [default: to 256 pixels]")
@click.option("--latents", type=click.Path(path_type=Path), help="File for the raw samples, .npy.")
@click.option("--stream", is_flag=True, help="Show the steps of a decoupled sampler; gRPC only.")
@click.option("--preview-every", type=int, help="Steps between the previews of --stream.")
@timeout_option
@json_option
def client(
    url: str,
    model: str,
    label: int | None,
    conditioning: Path | None,
    prompt: int,
    seed: int,
    num: int,
    steps: int | None,
    guidance: float | None,
    out: Path | None,
    scale: int | None,
    latents: Path | None,
    stream: bool,
    preview_every: int | None,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Ask a Triton server for images."""
    from treeq_export.client.images import ImageOrder
    from treeq_export.client.inputs import load_conditioning, pick_prompt
    from treeq_export.client.open import open_connection
    from treeq_export.client.sampler import read_info

    _check_file("--out", out)
    _check_file("--latents", latents)
    with open_connection(url, timeout_s) as connection:
        info = read_info(connection, model)
        _check_stream(connection, info, stream, preview_every)
        rows = None
        if conditioning is not None:
            rows = pick_prompt(load_conditioning(conditioning, info), prompt)
        order = ImageOrder(
            label=label,
            conditioning=rows,
            seed=seed,
            num=num,
            steps=steps,
            guidance=guidance,
            preview_every=preview_every,
            out=out,
            scale=scale,
            latents=latents,
            digest=as_json,
        )
        record = _fetch(connection, info, order, stream)
    if as_json:
        click.echo(record.model_dump_json(indent=2))
        return
    _print_images(record)


def _check_file(option: str, path: Path | None) -> None:
    if path is not None and (not path.name or path.is_dir()):
        raise ServeError(
            f"{option}: received {str(path)!r}, expected the name of a file. Name one.",
            kind="refused",
        )


def _check_stream(
    connection: "Connection", info: "SamplerInfo", stream: bool, preview_every: int | None
) -> None:
    if preview_every is not None and not stream:
        raise ServeError("--preview-every: needs --stream. Add it.", kind="refused")
    if info.decoupled and connection.address.scheme != "grpc":
        raise ServeError(
            f"{connection.url}: {info.name} streams, which HTTP cannot. Use --url grpc://"
            f"{connection.address.host}:PORT; Triton's own port of gRPC is 8001.",
            kind="refused",
        )
    if stream and not info.decoupled:
        raise ServeError(
            f"{connection.url}: {info.name} does not stream. Leave --stream out, or write its "
            "repository with `treeq-export serve --decoupled`.",
            kind="refused",
        )


def _fetch(
    connection: "Connection", info: "SamplerInfo", order: "ImageOrder", stream: bool
) -> "ImagesRecord":
    """Fetch the images; with a progress bar or, where stderr is no terminal, a line per step."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from treeq_export.client.images import fetch_images

    if not stream:
        return fetch_images(connection, info, order)
    if not stderr.is_terminal:
        return fetch_images(
            connection, info, order, lambda step, steps: say(f"step {step}/{steps}")
        )
    bar = Progress(TextColumn("steps"), BarColumn(), MofNCompleteColumn(), console=stderr)
    with bar:
        task = bar.add_task("", total=order.steps or info.steps)
        return fetch_images(
            connection, info, order, lambda step, _: bar.update(task, completed=step)
        )


def _print_images(record: "ImagesRecord") -> None:
    for image in record.images:
        what = "" if image.label is None else f"label {image.label}  "
        together = f" (batch of {image.batch})" if image.batch > 1 else ""
        click.echo(
            f"{what}seed {image.seed}  {image.step} steps  {image.latency_ms:.1f} ms{together}"
            f"  {image.file or ''}".rstrip()
        )
        for path in image.previews:
            click.echo(f"  {path}")
    if record.latents is not None:
        click.echo(f"raw samples  {record.latents}")


@main.command()
@url_option
@model_option
@click.option("--heal", is_flag=True, help="Unload and load the models that fail.")
@click.option(
    "--watch",
    "every_s",
    type=float,
    callback=_interval,
    metavar="SECONDS",
    help="Check every so many seconds and print each change; Ctrl-C ends it.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=float,
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Seconds after which a server without an answer is unhealthy.",
)
@json_option
def health(
    url: str, model: str, heal: bool, every_s: float | None, timeout_s: float, as_json: bool
) -> None:
    """Check a Triton server by one real inference.

    A server that says "ready" may still be unable to answer. Exit status 1 if it is not healthy.
    """
    if every_s is not None:
        with _stopped_by_signals() as stop:
            _watch(url, model, heal, every_s, timeout_s, as_json, stop)
        return
    record = _check(url, model, heal, timeout_s)
    if as_json:
        click.echo(json.dumps(record.as_json(), indent=2))
    if not record.healthy:
        raise ServeError(f"{record.url}: {record.summary()}", kind="failed")
    if not as_json:
        click.echo(f"{record.url}: {record.summary()}")
        if record.doubt is not None:
            say(record.doubt)


def _check(url: str, model: str, heal: bool, timeout_s: float) -> "HealthRecord":
    from treeq_export.client.health import check, check_and_heal
    from treeq_export.client.open import open_connection

    with open_connection(url, timeout_s) as connection:
        return (check_and_heal if heal else check)(connection, model)


@contextmanager
def _stopped_by_signals() -> Generator[threading.Event]:
    """Yield an event that Ctrl-C and SIGTERM set, also where a shell's `&` had Ctrl-C ignored.

    An exception would do, but for gRPC: one that is raised inside a call may be lost.
    """
    stop = threading.Event()

    def end(_number: int, _frame: object) -> None:
        stop.set()

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, end) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _watch(
    url: str,
    model: str,
    heal: bool,
    every_s: float,
    timeout_s: float,
    as_json: bool,
    stop: threading.Event,
) -> None:
    """Check until a signal, and tell what has changed."""
    before: tuple[object, ...] | None = None
    while not stop.is_set():
        start = time.monotonic()
        record = _check(url, model, heal, timeout_s)
        state = (record.error, *((each.name, each.healthy) for each in record.models))
        if state != before or record.reloaded:
            clock = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            if as_json:
                click.echo(json.dumps({"time": clock, **record.as_json()}))
            else:
                word = "" if record.healthy else "NOT HEALTHY: "
                click.echo(f"{clock} {record.url}: {word}{record.summary()}")
        before = state
        stop.wait(max(0.0, every_s - (time.monotonic() - start)))


@main.command()
@url_option
@model_option
@conditioning_option
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port of the page.",
)
@click.option("--address", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--allow-host",
    "allow_hosts",
    multiple=True,
    metavar="NAME",
    help="Host name that browsers may use beside localhost and numbers; * allows any.",
)
@timeout_option
def web(
    url: str,
    model: str,
    conditioning: Path | None,
    port: int,
    address: str,
    allow_hosts: tuple[str, ...],
    timeout_s: float,
) -> None:
    """Serve a web page that shows images of a Triton server.

    Ctrl-C ends it.
    """
    try:
        from treeq_export.client.web import SideCar, run_web
    except ModuleNotFoundError as error:
        raise ServeError(
            f"{error.name} is missing. Install it: pip install 'treeq-export[serve]'"
        ) from error

    side_car = SideCar(url, model, timeout_s=timeout_s, conditioning=conditioning)
    run_web(side_car, address, port, lambda page: say(f"{page}  Ctrl-C stops it."), allow_hosts)
