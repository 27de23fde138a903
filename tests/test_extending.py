"""docs/extending.md names the files that an addition touches: few, and such as exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "extending.md"
# Most files that an addition may touch; of an activation scale only those in Python count.
LIMITS = {
    "number grid": 8,
    "activation scale": 8,
    "model family": 2,
    "target": 3,
    "graph pass": 2,
}


def named_files() -> dict[str, list[tuple[str, str]]]:
    """Return path and text of each row of a section's first table, by what the section adds."""
    sections = re.split(r"^## Add an? ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    rows = re.compile(r"^\| `([^`]+)` \| (.*) \|$", re.MULTILINE)
    found = {}
    for section in sections:
        title, _, text = section.partition("\n")
        found[title.strip()] = rows.findall(text)
    return found


def test_every_section_has_a_limit():
    assert set(named_files()) <= set(LIMITS)


@pytest.mark.parametrize("addition", named_files())
def test_an_addition_touches_few_files(addition: str):
    files = [path for path, _ in named_files()[addition]]
    assert len(set(files)) == len(files)
    counted = [path for path in files if path.endswith(".py")]
    assert 0 < len(counted if addition == "activation scale" else files) <= LIMITS[addition]


@pytest.mark.parametrize("addition", named_files())
def test_the_named_files_exist(addition: str):
    for path, text in named_files()[addition]:
        place = ROOT / path
        if "<" in path:
            assert text.startswith("new"), path
            place = place.parent
        assert place.exists(), path
