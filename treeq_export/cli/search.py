"""The search command."""

from pathlib import Path

import click

from treeq_export.cli.console import json_option, main, run_option, say
from treeq_export.cli.stages import print_record, run_one
from treeq_export.run_folder import RunFolder


@main.command()
@run_option
@click.option(
    "--recipe", "recipe_path", type=click.Path(path_type=Path), help="Recipe, for a new run."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override the recipe.")
@click.option(
    "--noise",
    type=click.FloatRange(0, 1),
    metavar="LAMBDA",
    help="Environmental Noise Guidance: 1 for PTQ, 0 before training.",
)
@click.option(
    "--executor", type=click.Choice(("local", "ray")), help="Executor of the measurements."
)
@click.option("--estimate", is_flag=True, help="Say what the search would cost, and do nothing.")
@json_option
def search(
    run: Path,
    recipe_path: Path | None,
    overrides: tuple[str, ...],
    noise: float | None,
    executor: str | None,
    estimate: bool,
    as_json: bool,
) -> None:
    """Choose the formats of every layer.

    Writes plan.json and search.json.
    """
    for key, value in (("noise", noise), ("executor", executor)):
        overrides += () if value is None else (f"search.{key}={value}",)
    _prepare_run(run, recipe_path, overrides)
    if estimate:
        _estimate_search(run, as_json)
        return
    run_one(run, "search")
    print_record(run, RunFolder.PLAN, as_json)


def _prepare_run(run: Path, recipe_path: Path | None, overrides: tuple[str, ...]) -> None:
    """Start a new run, or change the recipe of an existing one."""
    from treeq_export.pipeline.workspace import Workspace
    from treeq_export.recipe import load_recipe, override_recipe

    if recipe_path is not None:
        recipe = load_recipe(recipe_path, overrides)
        with Workspace(run, recipe, str(recipe_path), overrides) as workspace:
            workspace.save()
    elif overrides:
        with Workspace.reopen(run) as workspace:
            workspace.recipe = override_recipe(workspace.recipe, overrides)
            workspace.overrides += overrides
            workspace.save()


def _estimate_search(run: Path, as_json: bool) -> None:
    from treeq_export.pipeline.workspace import Workspace
    from treeq_export.search.stage import estimate_search

    with Workspace.reopen(run) as workspace:
        denoiser, checkpoint = workspace.denoiser, workspace.checkpoint
        tell = say if as_json else click.echo
        cost = estimate_search(run, denoiser, checkpoint, workspace.recipe, tell)
    if as_json:
        click.echo(cost.model_dump_json(indent=2))
