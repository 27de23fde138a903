"""README, docs/ and their site: short, generated where it says so, no broken link or command."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest

from treeq_export.cli import main

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("kernels/**/*.md"))
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading).strip() for heading in headings)
    return {heading.lower().replace(" ", "-") for heading in plain}


def broken_links(page: Path) -> list[str]:
    broken: list[str] = []
    for link in LINK.findall(page.read_text()):
        path, _, anchor = link.partition("#")
        target = page if not path else page.parent / path
        if re.match(r"https?:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_recipe_page_is_what_the_models_say():
    script = load_script("recipe_reference")
    assert script.PAGE.read_text() == script.make_page()


def test_every_key_of_the_recipe_is_explained():
    page = load_script("recipe_reference").make_page()
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", page, re.MULTILINE)
    assert len(rows) > 90
    assert [key for key, meaning in rows if not meaning.strip()] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    assert broken_links(ROOT / page) == []


def test_a_broken_link_is_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("# A b\n[here](#a-b) [gone](gone.md) [self](page.md#c) [web](https://a.b)\n")
    assert broken_links(page) == ["gone.md", "page.md#c"]


def commands(page: str) -> list[str]:
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```(?:bash|yaml)\n(.*?)```", text, flags=re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return re.findall(r"(?<![\w/.])treeq-export ([a-z].*)$", joined, re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_have_the_options_that_pages_name(page: str):
    for line in commands(page):
        name, *arguments = shlex.split(line, comments=True)
        command = main.commands[name]
        context = click.Context(command, info_name=name)
        command.make_parser(context).parse_args(list(arguments))


def test_the_site_builds_without_a_warning(tmp_path: Path):
    pytest.importorskip("mkdocs")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet",
         "-f", ".mkdocs.yml", "-d", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {str(p.relative_to(tmp_path / "site")) for p in (tmp_path / "site").rglob("*.html")}
    names = {
        str(p.relative_to(ROOT / "docs").with_suffix(".html")) for p in ROOT.glob("docs/**/*.md")
    }
    assert names <= pages
    assert (tmp_path / "site/repository/samples/results/report.png").is_file()
