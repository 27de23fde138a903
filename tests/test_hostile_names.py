"""Names of a recipe, a layer or a file cannot steer a terminal, a configuration or a page."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from rich.table import Table
from rich.text import Text

from treeq_export.cli import main
from treeq_export.cli.screen import SafeConsole, printable
from treeq_export.errors import RecipeError
from treeq_export.recipe import load_recipe
from treeq_export.report.html import make_environment
from treeq_export.serve.configs import _quote

HOSTILE = (
    "\x1b]0;title\x07\x1b[2Jgone",
    "a\x00b",
    "two\nlines",
    "carriage\rreturn",
    "\x9b31m",
    "\u202eright to left",
    "\ud800",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_control_characters_are_written_as_escapes(text: str):
    shown = printable(text)
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert printable("grün [bold] 日本") == "grün [bold] 日本"


@pytest.mark.parametrize("text", HOSTILE)
def test_a_console_prints_no_commands_of_a_text(text: str):
    file = io.StringIO()
    console = SafeConsole(file=file, force_terminal=True, width=200)
    table = Table()
    table.add_column("layer")
    table.add_row(Text(text))
    console.print(Text(text), table, text)
    shown = file.getvalue()
    for command in ("\x1b]", "\x1b[2J", "\x07", "\x00", "\r", "\x9b", "\u202e", "\ud800"):
        assert command not in shown


def test_markup_in_a_text_is_printed_as_it_is():
    file = io.StringIO()
    SafeConsole(file=file, width=200).print("[red]a[/] [/nothing]")
    assert file.getvalue() == "[red]a[/] [/nothing]\n"


def test_an_error_line_is_one_printable_line(tmp_path: Path):
    path = tmp_path / "\x1b[2J\u202e\nrecipe.yaml"
    path.write_text("[")
    result = CliRunner().invoke(main, ["run", str(path), "--out", str(tmp_path / "run")])
    assert result.exit_code == 1
    assert "\\x1b[2J\\u202e recipe.yaml: not YAML" in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr[:-1].isprintable()


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[2J", "x" * 201])
def test_a_recipe_s_name_is_one_printable_line(name: str, tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    escaped = name.replace("\n", "\\n").replace("\x1b", "\\e")
    path.write_text(f'name: "{escaped}"\nmodel: {{checkpoint: c}}')
    with pytest.raises(RecipeError, match=r"recipe\.yaml: name: received "):
        load_recipe(path)


@pytest.mark.parametrize(
    "name",
    ['quote" } } name: "x', "back\\slash", "../../up", "it's", "new\nline", "grün", "{{ 1 }}"],
)
def test_a_name_in_a_config_is_the_same_name_when_parsed(name: str):
    config: Any = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    text = f"parameters {{ key: {_quote(name)} value {{ string_value: {_quote(name)} }} }}"
    message = text_format.Parse(text, config.ModelConfig())
    assert {key: value.string_value for key, value in message.parameters.items()} == {name: name}
    assert "\n" not in text


def test_a_name_in_a_page_is_text():
    template = make_environment().from_string("<p>{{ report.name }}</p>")
    page = template.render(report=SimpleNamespace(name="<script>alert('x')</script>&\""))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
