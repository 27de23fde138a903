"""The command that names the first layer out of bounds."""

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from treeq_export.cli.console import json_option, main, make_stdout, run_option, stage_progress
from treeq_export.errors import GateError


@main.command()
@run_option
@click.option(
    "--target",
    required=True,
    metavar="TARGET",
    help="Compiled target (ort, ort_body, tensorrt ...), cuda, or an engine (engines/...).",
)
@click.option(
    "--threshold-db",
    type=float,
    help="Least SQNR of a layer in dB  [default: the recipe's validate.gates.min_layer_sqnr_db]",
)
@json_option
def bisect(run: Path, target: str, threshold_db: float | None, as_json: bool) -> None:
    """Name the first layer of a target that is out of bounds.

    Exit status 3 if such a layer exists.
    """
    from treeq_export.bisect.cuda import CUDA
    from treeq_export.bisect.run import run_bisect
    from treeq_export.pipeline.run import require_results
    from treeq_export.pipeline.workspace import Workspace

    with Workspace.reopen(run, read_only=True) as workspace, stage_progress() as progress:
        require_results(workspace, "bisect", ("finetune" if target == CUDA else "compile",))
        record = run_bisect(
            workspace.run,
            workspace.denoiser,
            workspace.plan,
            workspace.tensors,
            target,
            workspace.recipe.validate_,
            workspace.recipe.seed,
            progress.start("bisect", False),
            min_sqnr_db=threshold_db,
        )
    if as_json:
        click.echo(record.model_dump_json(indent=2))
    else:
        _print(record)
    if record.layer is not None:
        raise GateError(record.sentence())


def _print(record: Any) -> None:
    if record.layer is None:
        make_stdout().print(record.sentence(), highlight=False, soft_wrap=True)
        return
    table = Table(title=f"{record.target}: first layer out of bounds", show_header=False)
    table.add_row("layer", record.layer)
    for reason in record.reasons:
        table.add_row("out of bounds", reason)
    table.add_row("looked at", f"{record.num_examined} of {record.num_layers} layers")
    if record.parity is not None:
        inside = record.parity.propagated_sqnr_db
        shown = "inside a fused node" if inside is None else f"{inside:.1f} dB"
        table.add_row("inside the network", shown)
        table.add_row("departs first there", record.departed or "no layer up to this one")
    make_stdout().print(table)
