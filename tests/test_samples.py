"""The samples and the benchmark of the kernels: that they run, and what they write."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from treeq_export.recipe import load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted(ROOT.glob("samples/*/*.yaml"))


def call(script: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid(path: Path):
    assert load_recipe(path).name


def test_there_are_recipes():
    assert len(RECIPES) >= 3


@pytest.mark.slow
def test_kernel_benchmark(tmp_path: Path):
    printed = call(
        "kernels/bench/bench_qlinear.py", "--out", tmp_path, "--rounds", 2, "--tokens", "1,3"
    )
    assert "treeq_w3a3" in printed
    record = json.loads((tmp_path / "bench.json").read_text())
    targets = {row["target"] for row in record["rows"]}
    assert targets >= {"treeq_w3a3", "ort_fp32", "ort_int8_static", "torch_int8_dynamic", "peak"}
    assert {(row["shape"], row["m"]) for row in record["rows"]} == {
        (shape, m) for shape in record["shapes"] for m in (1, 3)
    }
    assert all(len(row["all_times_ms"]) == 2 and row["gops"] > 0 for row in record["rows"])
    assert {row["m"] for row in record["block"]} == {1, 3}
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_profile(compiled_dit: Any, tmp_path: Path):
    out = tmp_path / "profile.json"
    printed = call("samples/dit_xl_2/profile_graph.py", "--run", compiled_dit.run, "--out", out)
    rows = json.loads(out.read_text())["rows"]
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert "FusedQLinear" in {row["operator"] for row in rows}
    assert "FusedQLinear" in printed
