"""The whole run, and one command per stage."""

import os
from pathlib import Path
from typing import Any

import click

from treeq_export.cli.console import (
    json_option,
    main,
    make_stdout,
    read_output,
    run_option,
    say,
    stage_progress,
    stderr,
)
from treeq_export.pipeline.stages import STAGE_NAMES, STAGES, Stage
from treeq_export.run_folder import RunFolder


@main.command("run")
@click.argument("recipe_path", metavar="RECIPE", type=click.Path(path_type=Path))
@click.option(
    "--out", "out", type=click.Path(path_type=Path), required=True, help="Folder of the run."
)
@click.option(
    "--from",
    "start",
    type=click.Choice(STAGE_NAMES),
    help="First stage to run again, up to date or not.",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override the recipe.")
@json_option
def run_command(
    recipe_path: Path, out: Path, start: str | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Run all stages of RECIPE.

    Stages that are up to date are skipped, and an interrupted run goes on where it was.
    """
    from treeq_export.recipe import load_recipe

    recipe = load_recipe(recipe_path, overrides)
    from treeq_export.pipeline.run import run_all
    from treeq_export.pipeline.workspace import Workspace
    from treeq_export.records import check_gates, gate_results

    with Workspace(out, recipe, str(recipe_path), overrides) as workspace:
        workspace.save()
        workspace.say = say
        with stage_progress() as progress:
            report = run_all(workspace, start, progress.start)
    show_report(report, out, as_json=as_json)
    check_gates(gate_results(out))


def show_report(report: Any, run: Path, *, as_json: bool) -> None:
    """Print a run's report: a table, or report.json as it is."""
    from treeq_export.report import print_report

    if as_json:
        click.echo(read_output(run / RunFolder.REPORT), nl=False)
    else:
        print_report(report, make_stdout())


def run_one(run: Path, name: str) -> tuple[object, str | None]:
    """Run one stage of an existing run.

    Returns:
        The stage's result, and why it had nothing to do where it had nothing.
    """
    from treeq_export.pipeline.run import check_recipe, require_stages, run_stage, stage_named
    from treeq_export.pipeline.workspace import Workspace

    stage = stage_named(name)
    with Workspace.reopen(run) as workspace, stage_progress() as progress:
        workspace.say = say
        check_recipe(workspace.recipe)
        require_stages(workspace, stage)
        result = run_stage(workspace, stage, progress.start(name, False))
        return result, stage.idle(workspace.recipe)


def print_record(run: Path, file: str, as_json: bool) -> None:
    """Print a stage's record, or say where it is."""
    text = read_output(run / file)
    if as_json:
        click.echo(text, nl=False)
    else:
        stderr.print(f"wrote {run / file}", highlight=False, soft_wrap=True)


def _add_command(stage: Stage) -> None:
    """Add the command that runs a stage, prints its record and checks the gates in it."""

    @main.command(stage.name, help=stage.summary)
    @run_option
    @json_option
    def command(run: Path, as_json: bool) -> None:
        from treeq_export.records import check_gates, gate_results

        _, idle = run_one(run, stage.name)
        if idle is not None:
            click.echo("null" if as_json else idle, err=not as_json)
            return
        print_record(run, stage.record, as_json)
        check_gates(gate_results(run, (stage.record,)))


for _stage in STAGES:
    if _stage.summary is not None:
        _add_command(_stage)


@main.command()
@run_option
@json_option
def report(run: Path, as_json: bool) -> None:
    """Write report.json and report.html.

    The report holds what has been measured so far.

    The report of a folder that cannot be written to is printed only.
    """
    if os.access(run, os.W_OK):
        show_report(run_one(run, "report")[0], run, as_json=as_json)
    else:
        _show_unwritten(run, as_json=as_json)


def _show_unwritten(run: Path, *, as_json: bool) -> None:
    from treeq_export.artefacts import json_text
    from treeq_export.pipeline.run import require_stages, stage_named
    from treeq_export.pipeline.stages import read_report
    from treeq_export.pipeline.workspace import Workspace
    from treeq_export.report import print_report, report_to_json

    with Workspace.reopen(run, read_only=True) as workspace:
        require_stages(workspace, stage_named("report"))
        made = read_report(workspace)
    say(f"{run}: read only, report.json and report.html are as they were.")
    if as_json:
        click.echo(json_text(report_to_json(made)), nl=False)
    else:
        print_report(made, make_stdout())
