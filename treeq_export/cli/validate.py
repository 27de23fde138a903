"""The command that compares a run with its reference, and with another run."""

import math
from pathlib import Path

import click

from treeq_export.cli.console import json_option, main, run_option, say
from treeq_export.cli.stages import print_record, run_one
from treeq_export.errors import GateError
from treeq_export.run_folder import RunFolder

_PATH = click.Path(path_type=Path)


def _share(_context: click.Context, _option: click.Parameter, value: float) -> float:
    if math.isnan(value):
        raise click.BadParameter("received nan, expected a share such as 0.1.")
    return value


@main.command()
@run_option
@click.option(
    "--junit", type=_PATH, metavar="FILE", help="Also write the results as JUnit XML to FILE."
)
@click.option(
    "--against", type=_PATH, metavar="DIR", help="Fail where errors have grown since the run DIR."
)
@click.option(
    "--max-growth",
    type=click.FloatRange(min=0),
    default=0.1,
    show_default=True,
    callback=_share,
    metavar="SHARE",
    help="Share by which an error may grow since the run of --against.",
)
@json_option
def validate(
    run: Path, junit: Path | None, against: Path | None, max_growth: float, as_json: bool
) -> None:
    """Compare every layer of every target with the reference.

    Exit status 3 if a gate is not met, or an error has grown too much.
    """
    from treeq_export.pipeline.workspace import Workspace
    from treeq_export.records import ParityRecord, check_gates, gate_results, load_record
    from treeq_export.validate.growth import Growth, describe_faults, find_growth, load_earlier
    from treeq_export.validate.junit import write_junit

    with Workspace.reopen(run, read_only=True) as workspace:
        section, seed = workspace.recipe.validate_, workspace.recipe.seed
    earlier = None if against is None else load_earlier(against, section.batch_size, seed)
    run_one(run, "validate")
    print_record(run, RunFolder.PARITY, as_json)
    record = load_record(run / RunFolder.PARITY, ParityRecord, "validate")
    growth = Growth({}, []) if earlier is None else find_growth(record, earlier, max_growth)
    faults = describe_faults(growth)
    for line in (*growth.missing, *faults):
        say(line)
    if junit is not None:
        write_junit(junit, record, section.gates, growth.faults)
    check_gates(gate_results(run, (RunFolder.PARITY,)))
    if faults:
        raise GateError(
            f"{len(faults)} layers or networks have errors that grew by more than {max_growth:.1%} "
            f"since {against}; each is named above."
        )
