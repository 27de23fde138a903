"""The command line. Results go to stdout, progress and logs to stderr.

Exit status: 0 done, 1 the user can repair it, 2 wrong usage, 3 a gate is not met.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from treeq_export import __version__
from treeq_export.errors import CheckpointError, TreeqError

STAGE_NAMES = (
    "search",
    "calibrate",
    "finetune",
    "compile",
    "validate",
    "bench",
    "evaluate",
    "report",
)

_FLUX_SIZE = 16

_stderr = Console(stderr=True)
_PIPE_WIDTH = 140  # columns of a table where stdout is no terminal


def _make_stdout() -> Console:
    """Return a console for results, made late because stdout may have been redirected."""
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return Console()
    return Console(width=_PIPE_WIDTH)


class Commands(click.Group):
    """Turns every error a user can meet into one line on stderr and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except TreeqError as error:
            _fail(str(error), error.exit_status)
        except KeyboardInterrupt:
            _fail("interrupted. Run the same command again to go on from the last stage.", 1)
        except BrokenPipeError:
            raise  # the reader of stdout has enough: click ends quietly
        except OSError as error:
            _fail(f"{error}. Repair that, then run the same command again.", 1)
        except MemoryError:
            _fail("out of memory. Lower the recipe's batch_size, or use a larger machine.", 1)
        except ModuleNotFoundError as error:
            _fail(f"{error}. `treeq-export doctor` says how to install it.", 1)


def _fail(message: str, status: int) -> None:
    line = " ".join(message.split())
    click.echo(f"treeq-export: {line}", err=True)
    sys.exit(status)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="treeq-export")
@click.option("--verbose", is_flag=True, help="Log what is done, to stderr.")
def main(verbose: bool) -> None:
    """From a Diffusion Transformer checkpoint to a validated, timed low-bit engine."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.ERROR,
        format="%(message)s",
        handlers=[RichHandler(console=_stderr, show_path=False)],
    )


@dataclass
class StageProgress:
    """One progress bar per stage, with an estimate of the time left.

    Attributes:
        progress: The bars.
        plain: Whether stderr is no terminal: then each stage is one line at its end.
        current: The stage at work.
    """

    progress: Progress
    plain: bool
    current: str = ""
    tasks: dict[str, Any] = field(default_factory=dict[str, Any])

    def start(self, name: str, skipped: bool) -> Callable[[float], None]:
        """Open a stage's bar and return its callback."""
        if skipped:
            _stderr.print(f"{name:<10} up to date", highlight=False)
            return lambda _fraction: None
        if self.plain:
            _stderr.print(f"{name:<10} ...", highlight=False)
        task = self.progress.add_task(name, total=1.0)
        self.tasks[name] = task
        return lambda fraction: self.progress.update(task, completed=fraction)


@contextmanager
def _stage_progress() -> Generator[StageProgress]:
    plain = not _stderr.is_terminal
    progress = Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=_stderr,
        disable=plain,
    )
    with progress:
        yield StageProgress(progress, plain)


_run_option = click.option(
    "--run", "run", type=click.Path(path_type=Path), required=True, help="Folder of the run."
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@main.command("run")
@click.argument("recipe_path", metavar="RECIPE", type=click.Path(path_type=Path))
@click.option(
    "--out", "out", type=click.Path(path_type=Path), required=True, help="Folder of the run."
)
@click.option(
    "--from", "start", type=click.Choice(STAGE_NAMES), help="Run again from this stage on."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override the recipe.")
@_json_option
def run_command(
    recipe_path: Path, out: Path, start: str | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Run all stages of RECIPE; resume after an interruption, skip what is up to date."""
    from treeq_export.recipe import load_recipe

    recipe = load_recipe(recipe_path, overrides)
    from treeq_export.pipeline import run_all
    from treeq_export.records import check_gates, gate_results
    from treeq_export.workspace import Workspace

    with Workspace(out, recipe, str(recipe_path), overrides) as workspace:
        workspace.save()
        workspace.say = _say
        with _stage_progress() as progress:
            report = run_all(workspace, start, progress.start)
    _show_report(report, out, as_json=as_json)
    check_gates(gate_results(out))


def _show_report(report: Any, run: Path, *, as_json: bool) -> None:
    from treeq_export.report import print_report

    if as_json:
        click.echo((run / "report.json").read_text(), nl=False)
    else:
        print_report(report, _make_stdout())


def _run_one(run: Path, name: str) -> object:
    """Run one stage of an existing run and return its result."""
    from treeq_export.pipeline import check_recipe, require_stages, run_stage, stage_named
    from treeq_export.workspace import Workspace

    stage = stage_named(name)
    with Workspace.reopen(run) as workspace, _stage_progress() as progress:
        workspace.say = _say
        check_recipe(workspace.recipe)
        require_stages(workspace, stage)
        return run_stage(workspace, stage, progress.start(name, False))


def _print_record(run: Path, file: str, as_json: bool) -> None:
    text = (run / file).read_text()
    if as_json:
        click.echo(text, nl=False)
    else:
        _stderr.print(f"wrote {run / file}", highlight=False, soft_wrap=True)


@main.command()
@_run_option
@click.option("--recipe", "recipe_path", type=click.Path(path_type=Path), help="For a new run.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override the recipe.")
@click.option(
    "--noise",
    type=click.FloatRange(0, 1),
    metavar="LAMBDA",
    help="Environmental Noise Guidance: 1 for PTQ, 0 before finetune.",
)
@click.option("--executor", type=click.Choice(("local", "ray")), help="Where to measure.")
@click.option("--estimate", is_flag=True, help="Only say what the search would cost.")
@_json_option
def search(
    run: Path,
    recipe_path: Path | None,
    overrides: tuple[str, ...],
    noise: float | None,
    executor: str | None,
    estimate: bool,
    as_json: bool,
) -> None:
    """Choose every layer's formats: writes plan.json and search.json."""
    for key, value in (("noise", noise), ("executor", executor)):
        overrides += () if value is None else (f"search.{key}={value}",)
    _prepare_run(run, recipe_path, overrides)
    if estimate:
        _estimate_search(run, as_json)
        return
    _run_one(run, "search")
    _print_record(run, "plan.json", as_json)


def _prepare_run(run: Path, recipe_path: Path | None, overrides: tuple[str, ...]) -> None:
    """Start a new run, or change the recipe of an existing one."""
    from treeq_export.recipe import load_recipe, override_recipe
    from treeq_export.workspace import Workspace

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
    from treeq_export.search.stage import estimate_search
    from treeq_export.workspace import Workspace

    with Workspace.reopen(run) as workspace:
        denoiser, checkpoint = workspace.denoiser, workspace.checkpoint
        cost = estimate_search(run, denoiser, checkpoint, workspace.recipe, _say)
    if as_json:
        click.echo(cost.model_dump_json(indent=2))


def _say(line: str) -> None:
    _stderr.print(line, highlight=False, soft_wrap=True)


@main.command()
@_run_option
@_json_option
def calibrate(run: Path, as_json: bool) -> None:
    """Find scales, codes and branches: writes plan.safetensors."""
    _run_one(run, "calibrate")
    _print_record(run, "calibration.json", as_json)


@main.command()
@_run_option
@_json_option
def finetune(run: Path, as_json: bool) -> None:
    """Train branches and scales by distillation from full precision (recipe: finetune.mode)."""
    if _run_one(run, "finetune") is None:
        click.echo(
            "null" if as_json else "finetune.mode is none: nothing was trained.", err=not as_json
        )
        return
    _print_record(run, "finetune.json", as_json)


@main.command("compile")
@_run_option
@_json_option
def compile_command(run: Path, as_json: bool) -> None:
    """Write and audit the ONNX graphs of all targets."""
    _run_one(run, "compile")
    _print_record(run, "compile.json", as_json)


@main.command()
@_run_option
@_json_option
def validate(run: Path, as_json: bool) -> None:
    """Compare every layer of every target with the reference; status 3 if a gate is not met."""
    _run_one(run, "validate")
    _print_record(run, "parity.json", as_json)
    _check_gates_of(run, "parity.json")


@main.command()
@_run_option
@_json_option
def bench(run: Path, as_json: bool) -> None:
    """Time all targets in one interleaved run, and measure their memory."""
    _run_one(run, "bench")
    _print_record(run, "bench.json", as_json)


@main.command()
@_run_option
@_json_option
def evaluate(run: Path, as_json: bool) -> None:
    """Sample with equal seeds and score the images; status 3 if a gate is not met."""
    _run_one(run, "evaluate")
    _print_record(run, "quality.json", as_json)
    _check_gates_of(run, "quality.json")


@main.command()
@_run_option
@_json_option
def report(run: Path, as_json: bool) -> None:
    """Write report.json and report.html from what has been measured so far."""
    _show_report(_run_one(run, "report"), run, as_json=as_json)


def _check_gates_of(run: Path, file: str) -> None:
    from treeq_export.records import check_gates, gate_results

    check_gates(gate_results(run, (file,)))


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
    help="Strategies of search.",
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
    help="Other toolkits' methods, such as modelopt_int8_max.",
)
@click.option(
    "--seeds", metavar="N,...", callback=_parsed("seeds"), help="Of the images; else the recipe's."
)
@click.option(
    "--out", "out", type=click.Path(path_type=Path), required=True, help="Folder of the comparison."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override the recipe.")
@_json_option
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
    """Run strategies at several budgets and write one table: compare.json, .html and .png."""
    from treeq_export.compare.options import CompareOptions
    from treeq_export.recipe import load_recipe

    options = CompareOptions(budgets, strategies, variants, peers or (), seeds)
    recipe = load_recipe(recipe_path, overrides)
    from treeq_export.compare.progress import CompareProgress
    from treeq_export.compare.stage import COMPARE_FILE, open_comparison, run_compare
    from treeq_export.compare.terminal import print_comparison

    with (
        open_comparison(out, recipe, str(recipe_path), overrides, options) as workspace,
        CompareProgress(_stderr) as progress,
    ):
        workspace.say = _say
        record = run_compare(workspace, options, progress)
    if as_json:
        click.echo((out / COMPARE_FILE).read_text(), nl=False)
    else:
        print_comparison(record, _make_stdout())


@main.command()
@click.option("--run", "run", type=click.Path(path_type=Path), help="Show this run's plan.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Show a checkpoint's layers.")
@click.option("--schema", is_flag=True, help="Print the JSON schema of plan.json.")
@_json_option
def inspect(run: Path | None, checkpoint: Path | None, schema: bool, as_json: bool) -> None:
    """Show a plan, a checkpoint's quantizable layers, or the schema of plan.json."""
    if sum((run is not None, checkpoint is not None, schema)) != 1:
        raise click.UsageError("give one of --run, --checkpoint and --schema.")
    if schema:
        from treeq_export.plan import json_schema

        click.echo(json.dumps(json_schema(), indent=2))
    elif run is not None:
        _inspect_run(run, as_json)
    elif checkpoint is not None:
        _inspect_checkpoint(checkpoint, as_json)


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
    _make_stdout().print(table)


def _inspect_checkpoint(path: Path, as_json: bool) -> None:
    from treeq_export.model.checkpoint import load_model, open_checkpoint
    from treeq_export.model.layers import discover_linears
    from treeq_export.model.zoo import make_denoiser
    from treeq_export.recipe import ModelSection

    checkpoint = open_checkpoint(path)
    # Flux states no size; the layers are the same at any.
    size = _FLUX_SIZE if checkpoint.class_name.startswith("Flux") else None
    section = ModelSection(checkpoint=str(path), latent_size=size)
    linears = discover_linears(make_denoiser(load_model(checkpoint), checkpoint, section))
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
    _make_stdout().print(table)


@main.command()
@_json_option
def doctor(as_json: bool) -> None:
    """Say what this machine has, what is missing, and the command that installs it."""
    from treeq_export.doctor import examine, findings_to_json, is_healthy

    findings = examine()
    if as_json:
        click.echo(json.dumps(findings_to_json(findings), indent=2))
    else:
        table = Table(title="treeq-export doctor")
        for heading in ("what", "found", "for", "install with"):
            table.add_column(heading)
        for finding in findings:
            missing = "[red]missing[/red]" if finding.required else "-"
            remedy = "" if finding.found else finding.remedy.replace("[", r"\[")
            table.add_row(finding.name, finding.found or missing, finding.purpose, remedy)
        _make_stdout().print(table)
    if not is_healthy(findings):
        missing = ", ".join(f.name for f in findings if f.required and f.found is None)
        raise TreeqError(f"doctor: missing {missing}. Install with the commands of the table.")


if __name__ == "__main__":
    main()
