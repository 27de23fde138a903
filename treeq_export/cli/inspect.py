"""The commands that look at something: inspect and doctor."""

import json
from pathlib import Path
from typing import Any, cast

import click
from rich.table import Table
from rich.text import Text

from treeq_export.cli.console import json_option, main, make_stdout, say
from treeq_export.errors import CheckpointError, TreeqError

_ANY_SIZE = 16  # of the latents of a model that states none; its layers are the same at any


@main.command()
@click.option("--run", "run", type=click.Path(path_type=Path), help="Show this run's plan.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Show a checkpoint's layers.")
@click.option("--variant", help="Variant of the checkpoint's weight files (fp16 ...).")
@click.option("--schema", is_flag=True, help="Print the JSON schema of plan.json.")
@json_option
def inspect(
    run: Path | None, checkpoint: Path | None, variant: str | None, schema: bool, as_json: bool
) -> None:
    """Show a plan, a checkpoint's layers, or the plan's schema."""
    if sum((run is not None, checkpoint is not None, schema)) != 1:
        raise click.UsageError("give one of --run, --checkpoint and --schema.")
    if schema:
        from treeq_export.plan import json_schema

        click.echo(json.dumps(json_schema(), indent=2))
    elif run is not None:
        _inspect_run(run, as_json)
    elif checkpoint is not None:
        _inspect_checkpoint(checkpoint, variant, as_json)


def _inspect_run(run: Path, as_json: bool) -> None:
    from treeq_export.plan import load_plan, plan_to_json

    plan = load_plan(run)
    if as_json:
        click.echo(plan_to_json(plan), nl=False)
        return
    table = Table(title=f"{plan.model.name}: {len(plan.layers)} quantized layers")
    for heading in ("layer", "K", "N", "weight", "activation", "rotation", "branch"):
        table.add_column(heading, no_wrap=heading == "layer")
    for layer in plan.layers:
        branch = layer.branch
        table.add_row(
            layer.name,
            str(layer.in_features),
            str(layer.out_features),
            f"{layer.weight.bits} bit"
            + (f" / {layer.weight.group_size}" if layer.weight.group_size else ""),
            f"{layer.activation.bits or 'float'} {layer.activation.scale}",
            str(layer.rotation_group),
            f"{branch.b_out}x{branch.b_in} r{branch.rank}" if branch else "-",
        )
    make_stdout().print(table)


def _inspect_checkpoint(path: Path, variant: str | None, as_json: bool) -> None:
    from treeq_export.model.checkpoint import load_model, open_checkpoint
    from treeq_export.model.conditioning import make_denoiser
    from treeq_export.model.layers import discover
    from treeq_export.recipe import ModelSection

    checkpoint = open_checkpoint(path, variant)
    for note in checkpoint.notes:
        say(note)
    model = load_model(checkpoint)
    size = None if "sample_size" in cast(Any, model).config else _ANY_SIZE
    section = ModelSection(checkpoint=str(path), latent_size=size)
    discovery = discover(make_denoiser(model, checkpoint, section))
    linears = discovery.linears
    if discovery.note is not None:
        say(discovery.note)
    if not linears:
        raise CheckpointError(f"{path}: no quantizable layer. Check num_layers in its config.json.")
    if as_json:
        click.echo(json.dumps([vars(linear) for linear in linears], indent=2))
        return
    table = Table(title=f"{checkpoint.name} ({checkpoint.class_name}): {len(linears)} layers")
    for heading in ("layer", "block", "leaf", "K", "N"):
        table.add_column(heading, no_wrap=heading == "layer")
    for linear in linears:
        sizes = (linear.block, linear.leaf, linear.in_features, linear.out_features)
        table.add_row(linear.name, *map(str, sizes))
    make_stdout().print(table)


@main.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine has, and how to get what is missing."""
    from treeq_export.doctor import examine, findings_to_json, is_healthy

    findings = examine()
    if as_json:
        click.echo(json.dumps(findings_to_json(findings), indent=2))
    else:
        table = Table(title="treeq-export doctor")
        for heading in ("what", "found", "for"):
            table.add_column(heading)
        table.add_column("install with", min_width=44)  # a command of pip on one line, to copy
        for finding in findings:
            missing = Text("missing", "red") if finding.required else "-"
            remedy = "" if finding.found else finding.remedy
            found = finding.found or finding.problem or missing
            table.add_row(finding.name, found, finding.purpose, remedy)
        make_stdout().print(table)
    if not is_healthy(findings):
        missing = ", ".join(f.name for f in findings if f.required and f.found is None)
        raise TreeqError(f"doctor: missing {missing}. Install with the commands of the table.")
