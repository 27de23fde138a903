"""`treeq-export loadtest`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich import box
from rich.table import Table

from treeq_export.cli.console import (
    json_option,
    main,
    make_stdout,
    say,
    sendable,
    stage_progress,
)
from treeq_export.errors import ServeError

if TYPE_CHECKING:
    from treeq_export.records.loadtest import LoadLevel, LoadTestRecord


def _numbers(_context: click.Context, _option: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: expected numbers, such as 1,2,4,8.") from error


def _paths(_context: click.Context, _option: click.Parameter, text: str) -> tuple[Path, ...]:
    return tuple(Path(part.strip()) for part in text.split(",") if part.strip())


@main.command()
@click.option("--url", help="Server address: http://host:port or grpc://host:port.")
@click.option(
    "--model",
    default="sampler",
    show_default=True,
    callback=sendable,
    help="Name of the sampler on the server.",
)
@click.option(
    "--concurrency",
    default="1,2,4,8",
    show_default=True,
    callback=_numbers,
    metavar="N,...",
    help="Numbers of clients; each client waits for its image, then asks for the next.",
)
@click.option(
    "--duration",
    type=float,
    default=30.0,
    show_default=True,
    help="Seconds that each number of clients is kept up.",
)
@click.option(
    "--warmup",
    type=float,
    default=3.0,
    show_default=True,
    help="Seconds before each measurement, not counted.",
)
@click.option("--steps", type=int, help="Solver steps  [default: the server's]")
@click.option("--guidance", type=float, help="Guidance scale  [default: the server's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first image.")
@click.option(
    "--timeout", type=float, default=60.0, show_default=True, help="Seconds to wait for an image."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("loadtest"),
    show_default=True,
    help="Folder of loadtest.json and loadtest.png.",
)
@click.option(
    "--note", default="", callback=sendable, help="Remark for the record (what is emulated ...)."
)
@click.option("--server-pid", type=int, help="Sample the memory of this process and its children.")
@click.option("--fresh", is_flag=True, help="Replace an existing record.")
@click.option(
    "--plot",
    "records",
    default="",
    callback=_paths,
    metavar="FILE,...",
    help="Load nothing; draw these records into one picture.",
)
@json_option
def loadtest(
    url: str | None,
    model: str,
    concurrency: tuple[int, ...],
    duration: float,
    warmup: float,
    steps: int | None,
    guidance: float | None,
    seed: int,
    timeout: float,
    out: Path,
    note: str,
    server_pid: int | None,
    fresh: bool,
    records: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Load a Triton server with more and more clients.

    Writes latencies, throughput and batch sizes.
    """
    if bool(url) == bool(records):
        raise click.UsageError("Give --url to load a server, or --plot to draw records.")
    if url is None:
        _plot(records, out)
        return
    from treeq_export.client.load_setup import LoadOptions
    from treeq_export.client.loadtest import find_doubts, run_loadtest
    from treeq_export.records.loadtest import describe_errors

    options = LoadOptions(
        url=url,
        model=model,
        concurrency=concurrency,
        duration_s=duration,
        warmup_s=warmup,
        steps=steps,
        guidance=guidance,
        seed=seed,
        note=note,
        server_pid=server_pid,
        timeout_s=timeout,
    )
    with stage_progress() as progress:
        record = run_loadtest(options, out, progress.start, fresh=fresh)
    _draw([("", record)], out)
    if as_json:
        click.echo(record.model_dump_json(indent=2))
    else:
        _print(record)
    for doubt in find_doubts(record):
        say(doubt)
    failure = describe_errors([each for each in record.levels if each.concurrency in concurrency])
    if failure is not None:
        raise ServeError(f"loadtest: {failure}", kind="failed")


def _plot(paths: tuple[Path, ...], out: Path) -> None:
    """Draw records that are there already."""
    from treeq_export.client.loadtest import read_loadtest

    _draw([(path.absolute().parent.name, read_loadtest(path)) for path in paths], out)


def _draw(records: "list[tuple[str, LoadTestRecord]]", out: Path) -> None:
    from treeq_export.artefacts import make_folder, write_bytes
    from treeq_export.client.loadtest import FIGURE_FILE
    from treeq_export.client.loadtest_figure import draw_png

    if any(record.levels for _, record in records):
        write_bytes(make_folder(out) / FIGURE_FILE, draw_png(records))


def _print(record: "LoadTestRecord") -> None:
    from treeq_export.client.loadtest_figure import describe_record

    table = Table(title=describe_record(record), box=box.SIMPLE_HEAD, title_justify="left")
    table.pad_edge, table.collapse_padding = False, True
    sampled = any(level.memory is not None for level in record.levels)
    for name in (
        "clients",
        *(f"{percentile}\nms" for percentile in ("p50", "p90", "p99", "max")),
        "images\nper s",
        "errors",
        *(f"batch\n{model.name}" for model in record.setup.models),
        *(("memory\nMB", "growth\nMB") if sampled else ()),
    ):
        table.add_column(name, justify="right")
    for level in record.levels:
        table.add_row(*_cells(level, len(record.setup.models), sampled))
    make_stdout().print(table)


def _cells(level: "LoadLevel", num_models: int, sampled: bool) -> list[str]:
    from treeq_export.report.quantities import format_fixed

    batches = [model.average_batch for model in level.models] or [None] * num_models
    memory = level.memory if level.memory is not None and level.memory.bytes else None
    growth = None if memory is None else memory.growth_bytes
    return [
        str(level.concurrency),
        *(
            format_fixed(value, 1)
            for value in (level.p50_ms, level.p90_ms, level.p99_ms, level.max_ms)
        ),
        format_fixed(level.images_per_s, 1),
        str(level.num_errors),
        *(format_fixed(batch) for batch in batches),
        *(
            (
                format_fixed(None if memory is None else memory.bytes[-1] / 1e6, 1),
                format_fixed(None if growth is None else growth / 1e6),
            )
            if sampled
            else ()
        ),
    ]
