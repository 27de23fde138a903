"""`treeq-export build`: TensorRT engines of a run's compiled graphs."""

from pathlib import Path
from typing import Any

import click
from rich import box
from rich.table import Table

from treeq_export.cli.console import (
    json_option,
    main,
    make_stdout,
    run_option,
    say,
    stage_progress,
)
from treeq_export.targets.names import ENGINES


def _split(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))


@main.command()
@run_option
@click.option(
    "--runtime",
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    required=True,
    help="Builder: TensorRT for this machine's GPU, TensorRT-RTX for any GPU, without one.",
)
@click.option(
    "--gpu",
    "gpus",
    required=True,
    callback=_split,
    metavar="SM[,SM...]",
    help="GPU architectures (sm_80,sm_89,sm_120); each gets its own engine.",
)
@click.option(
    "--target",
    "targets",
    default="",
    callback=_split,
    metavar="TARGET[,TARGET...]",
    help=f"Targets to build: {', '.join(ENGINES)}  [default: all that are compiled]",
)
@click.option(
    "--cache", type=click.Path(path_type=Path), help="Folder of finished builds, shared by runs."
)
@json_option
def build(
    run: Path,
    runtime: Any,
    gpus: tuple[str, ...],
    targets: tuple[str, ...],
    cache: Path | None,
    as_json: bool,
) -> None:
    """Build TensorRT engines and verify every planned layer."""
    from treeq_export.engines import BuildOptions, run_build
    from treeq_export.pipeline.run import require_results
    from treeq_export.pipeline.workspace import Workspace

    options = BuildOptions(runtime=runtime, gpus=gpus, targets=targets, cache=cache)
    options.check()
    with Workspace.reopen(run) as workspace, stage_progress() as progress:
        require_results(workspace, "build", ("compile",))
        record = run_build(run, options, workspace.recipe.compile, progress.start, say)
    if as_json:
        click.echo(record.model_dump_json(indent=2))
        return
    _print(record)


def _print(record: Any) -> None:
    table = Table(title="Engines", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("engine", overflow="fold")
    for column in ("", "MB", "build s", "peak GB", "plugins", "int8 gemms", "quantized layers"):
        table.add_column(column, justify="right")
    for engine in record.engines:
        manifest, verifier = engine.manifest, engine.manifest.verifier
        table.add_row(
            engine.path,
            engine.how,
            f"{manifest.engine_bytes / 1e6:.1f}",
            f"{manifest.build_s:.1f}",
            f"{manifest.peak_bytes / 1e9:.2f}",
            str(verifier.num_plugins),
            str(verifier.num_int8_gemms),
            f"{verifier.num_quantized} ({verifier.passed_fraction:.0%})",
        )
    make_stdout().print(table)
