"""Sentences stand alone: no docstring field and no option leans on the line above it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from treeq_export.cli import main
from treeq_export.cli.console import GROUPS

ROOT = Path(__file__).parent.parent
SOURCES = [
    path
    for folder in ("treeq_export", "treeq_served", "kernels", "experimental", "samples", "docs")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
LEANS = re.compile(r"(Of|Its|Likewise|As|Where|Such)\b")
FIELD = re.compile(r"^ {4}(?:(\*{0,2}\w+(?:, \*{0,2}\w+)*): )(.*)$")
SECTIONS = ("Args:", "Attributes:", "Raises:")


def fields(docstring: str) -> Iterator[tuple[str, str]]:
    """Yield name and sentence of every entry of a docstring's sections."""
    inside = False
    for line in docstring.splitlines():
        if line.strip() and not line.startswith(" "):
            inside = line.strip() in SECTIONS
        elif inside and (entry := FIELD.match(line)):
            yield entry.group(1), entry.group(2)


def leaning_fields(source: str) -> list[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [
        f"{node.name}.{name}: {sentence}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, kinds)
        for name, sentence in fields(ast.get_docstring(node) or "")
        if LEANS.match(sentence)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_field_leans_on_the_line_above(path: Path):
    assert leaning_fields(path.read_text()) == []


def test_a_leaning_field_is_found():
    source = '''
def f(a, b):
    """Do it.

    Args:
        a: Of the model.
        b: Offset of the model; as
            Of course.

    Returns:
        Of the model: nothing.
    """
'''
    assert leaning_fields(source) == ["f.a: Of the model."]


def options() -> list[tuple[str, click.Option]]:
    return [
        (f"{name} {option.opts[0]}", option)
        for name, command in main.commands.items()
        for option in command.params
        if isinstance(option, click.Option)
    ]


def test_no_option_leans_on_the_line_above():
    leaning = [f"{name}: {o.help}" for name, o in options() if o.help and LEANS.match(o.help)]
    assert leaning == []


@pytest.mark.parametrize("name", sorted(main.commands))
def test_a_command_is_in_one_group_and_its_help_fits(name: str):
    assert [name in names for names in GROUPS.values()].count(True) == 1
    shown = CliRunner().invoke(main, ["--help"], env={"COLUMNS": "80"}).stdout
    lines = [line for line in shown.splitlines() if line.startswith(f"  {name} ")]
    assert len(lines) == 1
    assert not lines[0].endswith("...")
    assert lines[0].endswith(".")
