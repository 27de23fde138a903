"""The README's commands run as they are written, in a copy that looks like a fresh clone."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from treeq_export.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line]


def test_the_make_commands_are_those_that_ci_runs():
    made = [line for line in commands() if line.startswith("make")]
    assert made == ["make demo", "make test"]
    (targets,) = re.findall(
        r"^for target in (.*); do$", (ROOT / ".ci/run").read_text(), re.MULTILINE
    )
    assert targets.split() == ["check", "test-all", "demo", "engines", "serve", "wheel"]
    makefile = (ROOT / "Makefile").read_text()
    check = makefile.split("\ncheck:")[1].split("\n\n")[0]
    assert "$(MAKE) test" in check


def test_every_image_of_the_readme_exists():
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert images
    for image in images:
        assert (ROOT / image).is_file(), image


@pytest.mark.slow
def test_the_treeq_export_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    (recipe,) = blocks("yaml")
    (tmp_path / "my_recipe.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    lines = [line for line in commands() if line.startswith("treeq-export")]
    assert len(lines) == 13
    for line in lines:
        done = CliRunner().invoke(main, line.split()[1:])
        assert done.exit_code == 0, f"{line}: {done.output}"
        assert done.stdout
    report = json.loads((tmp_path / "runs/mine/report.json").read_text())
    assert 2.9 < report["plan"]["average_weight_bits"] <= 3.0
    assert 3.9 < report["plan"]["average_activation_bits"] <= 4.0
    assert report["parity"]["portable"]["passed"] is True
    assert report["finetune"]["mode"] == "peft"
    emulated = report["parity"]["tensorrt"]
    assert emulated["passed"] is True
    assert "emulates" in emulated["runtime"]
    engines = {engine["target"]: engine for engine in report["engines"]}
    assert set(engines) == {"tensorrt", "tensorrt-native"}
    assert all(e["num_verified"] == e["num_quantized"] for e in engines.values())
    table = json.loads((tmp_path / "runs/table/compare.json").read_text())
    assert [row["strategy"] for row in table["rows"]] == ["uniform", "greedy"]
