"""The compare command."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from treeq_export.cli.console import json_option, main, make_stdout, read_output, say, stderr


def _parsed(kind: str) -> Callable[..., Any]:
    """Return the callback of a list option: `compare.options.parse_KIND`, or wrong usage."""

    def parse(_context: click.Context, _option: click.Parameter, text: str | None) -> Any:
        from treeq_export.compare.options import PARSERS

        try:
            return None if text is None else PARSERS[kind](text)
        except ValueError as error:
            raise click.BadParameter(f"{error}.") from error

    return parse


@main.command()
@click.argument("recipe_path", metavar="RECIPE", type=click.Path(path_type=Path))
@click.option(
    "--budgets",
    required=True,
    metavar="BITS,...",
    callback=_parsed("budgets"),
    help="Average bits of weights and of activations.",
)
@click.option(
    "--strategies",
    default="uniform,tss,integer_programming,greedy",
    show_default=True,
    metavar="NAME,...",
    callback=_parsed("strategies"),
    help="Search strategies to compare.",
)
@click.option(
    "--finetune",
    "variants",
    default="none",
    metavar="MODE,...",
    callback=_parsed("variants"),
    help="Train every cell in these modes as well: peft, qat.",
)
@click.option(
    "--peers",
    metavar="NAME,...",
    callback=_parsed("peers"),
    help="Methods of other toolkits (modelopt_int8_max ...).",
)
@click.option(
    "--seeds",
    metavar="N,...",
    callback=_parsed("seeds"),
    help="Seeds of the images  [default: the recipe's]",
)
@click.option(
    "--out", "out", type=click.Path(path_type=Path), required=True, help="Folder of the comparison."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override the recipe.")
@json_option
def compare(
    recipe_path: Path,
    budgets: tuple[float, ...],
    strategies: tuple[str, ...],
    variants: tuple[str, ...],
    peers: tuple[str, ...] | None,
    seeds: tuple[int, ...] | None,
    out: Path,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Compare search strategies at several budgets in one table.

    Writes compare.json, compare.html and compare.png.
    """
    from treeq_export.compare.options import CompareOptions
    from treeq_export.recipe import load_recipe

    options = CompareOptions(budgets, strategies, variants, peers or (), seeds)
    recipe = load_recipe(recipe_path, overrides)
    from treeq_export.compare.progress import CompareProgress
    from treeq_export.compare.stage import COMPARE_FILE, open_comparison, run_compare
    from treeq_export.compare.terminal import print_comparison

    with (
        open_comparison(out, recipe, str(recipe_path), overrides, options) as workspace,
        CompareProgress(stderr) as progress,
    ):
        workspace.say = say
        record = run_compare(workspace, options, progress)
    if as_json:
        click.echo(read_output(out / COMPARE_FILE), nl=False)
    else:
        print_comparison(record, make_stdout())
