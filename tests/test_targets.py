"""The table of targets, and a target that is added to it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from treeq_export.compile.stage import compile_target
from treeq_export.errors import RecipeError
from treeq_export.recipe import CompileSection, ValidateSection
from treeq_export.runners.ways import Way
from treeq_export.targets import names, portable, table
from treeq_export.targets.table import TARGETS, target_named, way_named
from treeq_export.validate.stage import run_validate

Make = Callable[..., Any]
FOLDER = Path(table.__file__).parent


def test_names_and_table_agree():
    assert [target.name for target in TARGETS] == [*names.GRAPHS, *names.ENGINES, names.FP32]
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "names", "table", "target"}
    assert files == {target.name.replace("-", "_") for target in TARGETS}


def test_every_way_runs_its_own_target():
    ways = [way for target in TARGETS for way in target.ways]
    assert all(way.target == target.name for target in TARGETS for way in target.ways)
    assert [target.ways[0].name for target in TARGETS] == [target.name for target in TARGETS]
    assert len({way.name for way in ways}) == len(ways)
    assert way_named("ort_body") == Way("ort_body", "ort", packed=True)


def test_what_a_target_is():
    engines = [target.name for target in TARGETS if target.is_engine]
    assert engines == ["tensorrt", "tensorrt-native"]
    assert [target.name for target in TARGETS if target.ways[0].emulated] == engines
    assert [target.name for target in TARGETS if target.ways[0].half] == engines
    assert [target.name for target in TARGETS if target.audit is None] == ["fp32"]


@pytest.mark.parametrize("find", [target_named, way_named])
def test_an_unknown_name_is_one_line(find: Callable[[str], object]):
    with pytest.raises(RecipeError, match=r"^target ort_boddy: unknown\. Choose one of portable"):
        find("ort_boddy")


def test_a_new_target_needs_no_more_than_its_object(
    compiled_dit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    toy = dataclasses.replace(portable.TARGET, name="toy", ways=(Way("toy", "toy"),))
    monkeypatch.setattr(table, "TARGETS", (*TARGETS, toy))
    plan, tensors = compiled_dit.plan, compiled_dit.tensors
    made = compile_target(tmp_path, compiled_dit.export(), "toy", plan, tensors, CompileSection())
    assert made.path == "onnx/toy/model.onnx"
    assert all(layer.integer for layer in made.audit)
    record = run_validate(
        tmp_path,
        compiled_dit.denoiser,
        plan,
        tensors,
        ["toy"],
        ValidateSection(batch_size=2),
        seed=1,
        on_step=lambda _: None,
    )
    [parity] = record.targets
    assert (parity.target, parity.passed) == ("toy", True)
