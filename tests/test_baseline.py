"""The uniform baseline beside a run, and evaluate without a compiled graph."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from treeq_export import calibrate
from treeq_export.errors import PlanError
from treeq_export.evaluate.stage import Baseline
from treeq_export.pipeline.run import (
    is_up_to_date,
    require_stages,
    run_sibling,
    run_stage,
    stage_named,
)
from treeq_export.pipeline.stages import baseline_of, open_baseline
from treeq_export.pipeline.workspace import Workspace
from treeq_export.plan import load_plan
from treeq_export.recipe import Recipe, load_recipe
from treeq_export.records import QualityRecord, load_record

SEARCHED = (
    "search.budget={weight_bits: 3, activation_bits: 4}",
    "search.branch_budget={parameter_fraction: 0.1}",
    "evaluate={num_samples: 2, runner: torch, baseline: uniform}",
    "calibrate.num_rows=4",
)


@pytest.fixture
def make_workspace(run_recipe: Path, tmp_path: Path) -> Iterator[Callable[..., Workspace]]:
    """A function: settings -> the workspace of tmp_path/run, the one before closed."""
    opened: list[Workspace] = []

    def make(*settings: str) -> Workspace:
        for workspace in opened:
            workspace.close()
        recipe = load_recipe(run_recipe, (*SEARCHED, *settings))
        opened.append(Workspace(tmp_path / "run", recipe))
        return opened[-1]

    yield make
    for workspace in opened:
        workspace.close()


@pytest.fixture
def calibrations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that a baseline is calibrated in."""
    folders: list[Path] = []
    run_calibrate = calibrate.run_calibrate

    def count(run: Path, *args: Any) -> object:
        folders.extend([run] if run.name == "baseline" else [])
        return run_calibrate(run, *args)

    monkeypatch.setattr(calibrate, "run_calibrate", count)
    return folders


def make_baseline(workspace: Workspace, on_step: Callable[[float], None]) -> Baseline:
    """What evaluate measures beside a run, made where it is not up to date."""
    run_sibling(workspace, stage_named("evaluate"), on_step)
    with ExitStack() as stack:
        made = open_baseline(workspace, stack)
    assert made is not None
    return made


def test_recipe_of_the_baseline(run_recipe: Path) -> None:
    recipe = load_recipe(run_recipe, (*SEARCHED, "search.strategy=tss"))
    made = baseline_of(recipe)
    assert made is not None
    uniform = made.recipe
    assert uniform.search.strategy == "uniform"
    assert uniform.search.branch_budget is None
    assert uniform.search.branch == recipe.search.branch
    assert uniform.search.budget == recipe.search.budget
    assert uniform.calibrate == recipe.calibrate


def test_is_made_once(make_workspace: Callable[..., Workspace], calibrations: list[Path]) -> None:
    steps: list[float] = []
    workspace = make_workspace()
    made = make_baseline(workspace, steps.append)
    assert made.plan.strategy.name == "uniform"
    assert (made.plan.average_weight_bits, made.plan.average_activation_bits) == (3.0, 4.0)
    assert steps[-1] == pytest.approx(0.1)  # of evaluate's work
    assert steps == sorted(steps)
    folder = workspace.run / "baseline"
    assert load_plan(folder) == made.plan
    assert make_baseline(workspace, steps.append).source == made.source
    assert calibrations == [folder]


@pytest.mark.parametrize("change", ["recipe", "tensors", "interrupted"])
def test_is_made_again_when_something_changed(
    make_workspace: Callable[..., Workspace], calibrations: list[Path], change: str
) -> None:
    source = make_baseline(make_workspace(), lambda _: None).source
    settings = ("calibrate.num_clip_steps=5",) if change == "recipe" else ()
    workspace = make_workspace(*settings)
    folder = workspace.run / "baseline"
    if change == "tensors":
        (folder / "plan.safetensors").write_bytes(b"half")
    elif change == "interrupted":
        (folder / "run.json").unlink()
    made = make_baseline(workspace, lambda _: None)
    assert (made.source == source) == (change != "recipe")
    assert len(calibrations) == 2


def test_evaluate_on_torch_needs_no_graph_and_measures_the_baseline(
    make_workspace: Callable[..., Workspace], calibrations: list[Path]
) -> None:
    workspace = make_workspace("search.branch_budget=null", "finetune.mode=none")
    evaluate = stage_named("evaluate")
    for name in ("search", "calibrate", "finetune"):
        run_stage(workspace, stage_named(name), lambda _: None)
    require_stages(workspace, evaluate)
    steps: list[float] = []
    run_stage(workspace, evaluate, steps.append)
    assert steps == sorted(steps)
    assert steps[-1] == pytest.approx(1.0)
    assert is_up_to_date(workspace, evaluate)
    assert not (workspace.run / "onnx").exists()
    record = load_record(workspace.run / "quality.json", QualityRecord, "evaluate")
    assert record.baseline is not None
    # Uniform bits against uniform bits: the same plan, hence the same images.
    assert record.baseline.network_mse == record.network_mse
    assert record.baseline.scores == record.quantized
    assert len(calibrations) == 1
    run_stage(workspace, stage_named("calibrate"), lambda _: None)
    assert not (workspace.run / "quality.json").exists()


def test_evaluate_on_a_graph_still_needs_compile(
    make_workspace: Callable[..., Workspace],
) -> None:
    workspace = make_workspace("evaluate.runner=ort", "search.branch_budget=null")
    for name in ("search", "calibrate", "finetune"):
        run_stage(workspace, stage_named(name), lambda _: None)
    with pytest.raises(PlanError, match="evaluate needs the result of compile"):
        require_stages(workspace, stage_named("evaluate"))


def test_recipe_knows_no_other_baseline(run_recipe: Path) -> None:
    values = load_recipe(run_recipe).model_dump(mode="json", by_alias=True)
    values["evaluate"]["baseline"] = "greedy"
    with pytest.raises(ValueError, match="baseline"):
        Recipe.model_validate(values)
