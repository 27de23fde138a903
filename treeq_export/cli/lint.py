"""`treeq-export lint`: what is not right in a Triton model repository."""

import json
from pathlib import Path

import click
from rich import box
from rich.table import Table
from rich.text import Text

from treeq_export.cli.console import json_option, main, make_stdout
from treeq_export.errors import ServeError


@main.command()
@click.argument("repository", type=click.Path(path_type=Path))
@json_option
def lint(repository: Path, as_json: bool) -> None:
    """Check a Triton model REPOSITORY: configurations and files."""
    from treeq_export.serve.lint import lint_repository
    from treeq_export.serve.lint.read import count_models

    findings = lint_repository(repository)
    rows = [(each.path.as_posix(), each.rule, each.message) for each in findings]
    if as_json:
        keys = ("path", "rule", "message")
        click.echo(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=2))
    elif rows:
        make_stdout().print(_make_table(rows))
    if rows:
        files = len({path for path, _, _ in rows})
        raise ServeError(
            f"{repository}: {_count(len(rows), 'finding')} in {_count(files, 'file')}, expected "
            "none. Do what the messages say, then run the same command again."
        )
    if not as_json:
        click.echo(f"{_count(count_models(repository), 'model')}, no findings")


def _make_table(rows: list[tuple[str, str, str]]) -> Table:
    table = Table(title="Findings", box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("file", "rule", "message"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # a message holds brackets that are no markup
    return table


def _count(num: int, noun: str) -> str:
    return f"{num} {noun}" if num == 1 else f"{num} {noun}s"
