"""What all commands share: consoles, progress bars, errors as one line, the group itself."""

import logging
import os
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

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

from treeq_export import __version__
from treeq_export.cli.process import Interrupted, open_standard_streams, orderly_end
from treeq_export.cli.screen import SafeConsole, printable
from treeq_export.environment import settle_threads
from treeq_export.errors import PlanError, TreeqError
from treeq_export.memory import is_out_of_memory, out_of_memory
from treeq_export.progress import OnStep
from treeq_export.reading import read_text

stderr = SafeConsole(stderr=True)
_PIPE_WIDTH = 140  # columns of a table where stdout is no terminal


def make_stdout() -> Console:
    """Return a console for results, made late because stdout may have been redirected."""
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return SafeConsole()
    return SafeConsole(width=_PIPE_WIDTH)


_SHORT_HELP = 66  # columns that are left beside the name on a terminal of 80
GROUPS = {
    "Make a model": ("run", "search", "calibrate", "finetune", "compile", "compare"),
    "Run it": ("validate", "bench", "evaluate", "build", "bisect"),
    "Serve it": ("serve", "lint", "client", "health", "web", "loadtest"),
    "Look": ("report", "inspect", "doctor"),
}


class Commands(click.Group):
    """Turns every error a user can meet into one line on stderr and an exit status."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands in groups, with the first sentence of their help."""
        width = max(map(len, self.commands))
        for title, names in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [
                        (f"{name:<{width}}", self.commands[name].get_short_help_str(_SHORT_HELP))
                        for name in names
                    ]
                )

    def main(self, *args: Any, **extra: Any) -> Any:
        """Prepare the process, then read the arguments and run the command."""
        open_standard_streams()
        settle_threads()
        with orderly_end(), _explained():
            return super().main(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with _explained(ctx):
            return super().invoke(ctx)


@contextmanager
def _explained(ctx: click.Context | None = None) -> Generator[None]:
    """End the process with one line where an error is a user's to repair."""
    try:
        yield
    except TreeqError as error:
        _fail(str(error), error.exit_status)
    except KeyboardInterrupt as error:
        status = error.exit_status if isinstance(error, Interrupted) else 128 + signal.SIGINT
        _fail("interrupted. Run the same command again to go on from the last stage.", status)
    except BrokenPipeError:
        raise  # the reader of stdout has enough: click ends quietly
    except OSError as error:
        if is_out_of_memory(error):
            _fail(_describe_shortage(ctx), 1)
        _fail(f"{error}. Repair that, then run the same command again.", 1)
    except ModuleNotFoundError as error:
        _fail(f"{error}. `treeq-export doctor` says how to install it.", 1)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        _fail(_describe_shortage(ctx), 1)


def _describe_shortage(ctx: click.Context | None) -> str:
    command = None if ctx is None else ctx.invoked_subcommand
    return str(out_of_memory(command or "treeq-export", ()))


def _fail(message: str, status: int) -> NoReturn:
    line = printable(" ".join(message.split()))
    with suppress(OSError):  # stderr may be full or closed: the status says it as well
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
        handlers=[RichHandler(console=stderr, show_path=False)],
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

    def start(self, name: str, skipped: bool) -> OnStep:
        """Open a stage's bar and return its callback."""
        if skipped:
            stderr.print(f"{name:<10} up to date", highlight=False)
            return lambda _fraction: None
        if self.plain:
            stderr.print(f"{name:<10} ...", highlight=False)
        task = self.progress.add_task(name, total=1.0)
        self.tasks[name] = task
        return lambda fraction: self.progress.update(task, completed=fraction)


@contextmanager
def stage_progress() -> Generator[StageProgress]:
    """Show one bar per stage while the block runs."""
    plain = not stderr.is_terminal
    progress = Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=stderr,
        disable=plain,
    )
    with progress:
        yield StageProgress(progress, plain)


run_option = click.option(
    "--run", "run", type=click.Path(path_type=Path), required=True, help="Folder of the run."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def read_output(path: Path) -> str:
    """Return a text that the command itself has just written."""
    return read_text(path, error=PlanError, remedy="Run the same command again.")


def sendable(_context: click.Context, _option: click.Parameter, text: str | None) -> str | None:
    """Check that an option's text can be sent, written and shown; a callback of click."""
    if text is not None and not text.isprintable():
        raise click.BadParameter(f"{text!r}: expected printable characters.")
    return text


def say(line: str) -> None:
    """Print a line for people, to stderr."""
    stderr.print(line, highlight=False, soft_wrap=True)
