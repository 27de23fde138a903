"""Which stages run again after which change, with stages of a few lines; and what a run leaves."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from treeq_export.errors import GateError, PlanError, RecipeError, TreeqError
from treeq_export.pipeline import run as pipeline
from treeq_export.pipeline.run import (
    check_recipe,
    recipe_with_digests,
    require_stages,
    run_all,
    run_stage,
    stage_named,
)
from treeq_export.pipeline.stages import STAGE_NAMES
from treeq_export.pipeline.workspace import Workspace
from treeq_export.plan import (
    LayerPlan,
    ModelRecord,
    Plan,
    StrategyRecord,
    TreePath,
    load_plan,
    save_plan,
)
from treeq_export.quant.spec import ActivationFormat, WeightFormat
from treeq_export.recipe import load_recipe, strategy_options
from treeq_export.records import GateResult, check_gates, gate_results
from treeq_export.report import Report

ALL = set(STAGE_NAMES)
FROM_CALIBRATE = ALL - {"search"}
FROM_FINETUNE = FROM_CALIBRATE - {"calibrate"}
FROM_COMPILE = FROM_FINETUNE - {"finetune"}


class FakeStages:
    """Stages that write what the real ones write, in name, and remember that they ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fail_in = ""
        self.fail_early = False
        self.error: BaseException = TreeqError("broken")

    def make_all(self) -> tuple[pipeline.Stage, ...]:
        return tuple(
            dataclasses.replace(stage, execute=self.make(stage.name)) for stage in pipeline.STAGES
        )

    def make(self, name: str) -> Callable[..., object]:
        def execute(workspace: Workspace, on_step: Callable[[float], None]) -> object:
            self.ran.append(name)
            if name == self.fail_in and self.fail_early:
                raise self.error
            result = getattr(self, f"write_{name}", self.write_record)(workspace, name)
            if name == self.fail_in:
                raise self.error
            on_step(1.0)
            return result

        return execute

    def write_search(self, workspace: Workspace, _: str) -> None:
        layer = LayerPlan(
            name="blocks.0.fc",
            in_features=8,
            out_features=8,
            tree=TreePath(block=0, position="fc", leaf=0),
            weight=WeightFormat(bits=workspace.recipe.search.weight_bits),
            activation=ActivationFormat(bits=4, scale="token_rms"),
        )
        plan = Plan(
            format_version=1,
            model=ModelRecord(name=workspace.recipe.name, class_name="DiT", num_parameters=1),
            checkpoint_sha256=workspace.checkpoint.sha256,
            strategy=StrategyRecord(
                name="uniform", options=strategy_options(workspace.recipe.search)
            ),
            layers=(layer,),
        )
        (workspace.run / "search.json").write_text("{}")
        save_plan(workspace.run, plan)

    def write_calibrate(self, workspace: Workspace, _: str) -> None:
        plan = workspace.plan
        (workspace.run / "calibration.json").write_text("{}")
        save_plan(workspace.run, plan, {})

    def write_finetune(self, workspace: Workspace, _: str) -> None:
        for file in ("finetune.json", "finetuned.safetensors"):
            if workspace.recipe.finetune.mode == "none":
                (workspace.run / file).unlink(missing_ok=True)
            else:
                (workspace.run / file).write_text("{}")

    def write_compile(self, workspace: Workspace, _: str) -> None:
        for target in ("fp32", *workspace.recipe.compile.targets):
            folder = workspace.run / "onnx" / target
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "model.onnx").write_text("graph")
            (folder / "model.onnx.data").write_text("weights")
        (workspace.run / "compile.json").write_text("{}")

    def write_record(self, workspace: Workspace, name: str) -> None:
        for file in stage_named(name).outputs(workspace):
            (workspace.run / file).write_text("{}")

    def write_report(self, workspace: Workspace, name: str) -> Report:
        self.write_record(workspace, name)
        return object.__new__(Report)


class Runs:
    """Runs of one recipe in one folder, each like a process of its own."""

    def __init__(self, recipe: Path, run: Path, stages: FakeStages) -> None:
        self.recipe, self.run, self.stages = recipe, run, stages

    def __call__(self, *overrides: str, start: str | None = None) -> set[str]:
        """Run all; return the stages that ran."""
        self.stages.ran.clear()
        with self.open(*overrides) as workspace:
            run_all(workspace, start, lambda _name, _skipped: lambda _fraction: None)
        return set(self.stages.ran)

    def open(self, *overrides: str) -> Workspace:
        return Workspace(self.run, load_recipe(self.recipe, overrides), "r.yaml", overrides)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    fakes = FakeStages()
    monkeypatch.setattr(pipeline, "STAGES", fakes.make_all())
    return fakes


@pytest.fixture
def runs(run_recipe: Path, stages: FakeStages, tmp_path: Path) -> Runs:
    """A finished run, with a recipe and a checkpoint of its own."""
    folder = tmp_path / "recipe"
    shutil.copytree(run_recipe.parent, folder)
    runs = Runs(folder / "recipe.yaml", tmp_path / "run", stages)
    assert runs() == ALL
    return runs


class TestWhatRunsAgain:
    def test_nothing_but_the_report(self, runs: Runs) -> None:
        assert runs() == {"report"}
        assert runs() == {"report"}

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("name=other", ALL),
            ("model.latent_size=4", ALL),
            ("search.weight_bits=5", ALL),
            ("sampler.steps=3", FROM_CALIBRATE),
            ("seed=1", FROM_CALIBRATE),
            ("calibrate.num_samples=3", FROM_CALIBRATE),
            ("finetune.steps=3", FROM_FINETUNE),
            ("finetune.mode=none", FROM_FINETUNE),
            ("compile.targets=[ort,portable]", FROM_COMPILE),
            ("validate.batch_size=3", {"validate", "report"}),
            ("validate.gates.min_layer_sqnr_db=50", {"validate", "report"}),
            ("bench.rounds=4", {"bench", "report"}),
            ("evaluate.num_samples=3", {"evaluate", "report"}),
        ],
    )
    def test_after_a_change_of_the_recipe(
        self, runs: Runs, override: str, expected: set[str]
    ) -> None:
        assert runs(override) == expected
        assert runs(override) == {"report"}

    @pytest.mark.parametrize("start", STAGE_NAMES)
    def test_from_a_stage_on(self, runs: Runs, start: str) -> None:
        assert runs(start=start) == set(STAGE_NAMES[STAGE_NAMES.index(start) :])

    @pytest.mark.parametrize("damage", ["delete", "truncate"])
    @pytest.mark.parametrize(
        ("file", "expected"),
        [
            ("plan.json", ALL),
            ("plan.safetensors", FROM_CALIBRATE),
            ("calibration.json", FROM_CALIBRATE),
            ("finetune.json", FROM_FINETUNE),
            ("finetuned.safetensors", FROM_FINETUNE),
            ("compile.json", FROM_COMPILE),
            ("onnx/ort/model.onnx", FROM_COMPILE),
            ("onnx/ort/model.onnx.data", FROM_COMPILE),
            ("onnx/fp32/model.onnx", FROM_COMPILE),
            ("parity.json", {"validate", "report"}),
            ("bench.json", {"bench", "report"}),
            ("quality.json", {"evaluate", "report"}),
            ("report.html", {"report"}),
        ],
    )
    def test_after_damage(self, runs: Runs, file: str, expected: set[str], damage: str) -> None:
        path = runs.run / file
        if damage == "delete":
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size // 2)
        assert runs() == expected
        assert runs() == {"report"}

    def test_edited_plan_is_kept_and_used(self, runs: Runs) -> None:
        path = runs.run / "plan.json"
        edited = json.loads(path.read_text())
        edited["layers"][0]["weight"]["bits"] = 6
        path.write_text(json.dumps(edited))
        assert runs() == FROM_CALIBRATE
        assert json.loads(path.read_text())["layers"][0]["weight"]["bits"] == 6

    def test_unusable_plan_costs_no_result(self, runs: Runs) -> None:
        path = runs.run / "plan.json"
        original = path.read_text()
        path.write_text(original.replace('"bits": 4', '"bits": 9'))
        with pytest.raises(PlanError, match=r"layers\.0\.weight\.bits"):
            runs()
        path.write_text(original)
        assert runs() == {"report"}

    def test_after_a_change_of_the_checkpoint(self, runs: Runs) -> None:
        config = runs.recipe.parent / "checkpoint" / "config.json"
        changed = json.loads(config.read_text()) | {"dropout": 0.5}
        config.write_text(json.dumps(changed))
        assert runs() == ALL

    def test_a_moved_checkpoint_is_the_same(self, runs: Runs) -> None:
        checkpoint = runs.recipe.parent / "checkpoint"
        moved = checkpoint.rename(checkpoint.with_name("moved"))
        assert runs(f"model.checkpoint={moved}") == {"report"}

    @pytest.mark.parametrize(
        ("key", "expected"),
        [
            ("evaluate.classifier", {"evaluate", "report"}),
            ("evaluate.reference", {"evaluate", "report"}),
        ],
    )
    def test_after_a_change_of_a_file_of_the_recipe(
        self, runs: Runs, key: str, expected: set[str]
    ) -> None:
        file = runs.recipe.parent / "file"
        file.write_text("a")
        assert runs(f"{key}={file}") == expected
        assert runs(f"{key}={file}") == {"report"}
        file.write_text("b")
        assert runs(f"{key}={file}") == expected
        copy = shutil.copy(file, file.with_name("copy"))
        assert runs(f"{key}={copy}") == {"report"}

    def test_after_an_update(self, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pipeline, "__version__", "99.0")
        assert runs() == ALL

    def test_stages_of_another_version_are_forgotten(self, runs: Runs) -> None:
        path = runs.run / "run.json"
        record = json.loads(path.read_text())
        record["stages"]["serve"] = record["stages"]["bench"]
        path.write_text(json.dumps(record))
        assert runs() == {"report"}
        assert "serve" not in json.loads(path.read_text())["stages"]


class TestFailure:
    @pytest.mark.parametrize("name", STAGE_NAMES)
    def test_finished_stages_are_kept(self, runs: Runs, stages: FakeStages, name: str) -> None:
        stages.fail_in = name
        with pytest.raises(TreeqError, match="broken"):
            runs(start="search")
        assert stages.ran == list(STAGE_NAMES[: STAGE_NAMES.index(name) + 1])
        stages.fail_in = ""
        # What search wrote before it failed is the plan of this recipe: calibrate goes on from it.
        first = "calibrate" if name == "search" else name
        assert runs() == set(STAGE_NAMES[STAGE_NAMES.index(first) :])

    def test_calibrate_has_completed_the_plan_already(self, runs: Runs, stages: FakeStages) -> None:
        # The plan is no longer as search wrote it, but search need not run again.
        stages.fail_in, stages.error = "calibrate", KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            runs("calibrate.num_clip_steps=9")
        stages.fail_in = ""
        assert runs("calibrate.num_clip_steps=9") == FROM_CALIBRATE

    def test_no_result_of_the_old_plan_is_left(self, runs: Runs, stages: FakeStages) -> None:
        stages.fail_in = "calibrate"
        with pytest.raises(TreeqError, match="broken"):
            runs("search.weight_bits=5")
        left = {path.name for path in runs.run.rglob("*") if path.is_file()}
        assert left == {
            ".lock",
            "run.json",
            "plan.json",
            "search.json",
            "plan.safetensors",
            "calibration.json",
        }

    def test_results_that_do_not_depend_on_it_stay(self, runs: Runs, stages: FakeStages) -> None:
        stages.fail_in = "validate"
        with pytest.raises(TreeqError, match="broken"):
            runs("validate.batch_size=3")
        for kept in ("parity.json", "report.json", "bench.json"):
            assert (runs.run / kept).is_file()
        stages.fail_in = ""
        assert runs("validate.batch_size=3") == {"validate", "report"}


class TestProgress:
    def test_every_stage_is_announced(self, runs: Runs) -> None:
        announced: list[tuple[str, bool]] = []
        fractions: list[float] = []

        def on_stage(name: str, skipped: bool) -> Callable[[float], None]:
            announced.append((name, skipped))
            return fractions.append

        (runs.run / "bench.json").unlink()
        with runs.open() as workspace:
            run_all(workspace, None, on_stage)
        assert announced == [(name, name not in ("bench", "report")) for name in STAGE_NAMES]
        assert fractions == [1.0, 1.0]

    def test_seconds_are_recorded(self, runs: Runs) -> None:
        with runs.open() as workspace:
            run_stage(workspace, stage_named("bench"), lambda _: None)
            seconds = workspace.stages["bench"].seconds
        assert 0 <= seconds < 10


class TestRequireStages:
    def test_satisfied_by_a_finished_run(self, runs: Runs) -> None:
        with runs.open() as workspace:
            for name in STAGE_NAMES:
                require_stages(workspace, stage_named(name))
            assert set(workspace.stages) == ALL

    @pytest.mark.parametrize(
        ("missing", "wanted"),
        [
            ("search", "calibrate"),
            ("search", "evaluate"),
            ("calibrate", "finetune"),
            ("finetune", "compile"),
            ("calibrate", "bench"),
            ("compile", "validate"),
        ],
    )
    def test_names_the_first_one_to_run(self, runs: Runs, missing: str, wanted: str) -> None:
        with runs.open() as workspace:
            for name in STAGE_NAMES[STAGE_NAMES.index(missing) :]:
                del workspace.stages[name]
            expected = (
                rf"{wanted} needs the result of {missing}, which is not there yet\. "
                rf"Run `treeq-export {missing} --run .*run` first\."
            )
            with pytest.raises(PlanError, match=expected):
                require_stages(workspace, stage_named(wanted))

    def test_out_of_date(self, runs: Runs) -> None:
        os.truncate(runs.run / "plan.safetensors", 3)
        with (
            runs.open() as workspace,
            pytest.raises(PlanError, match="bench needs the result of calibrate, which is out of"),
        ):
            require_stages(workspace, stage_named("bench"))

    def test_independent_stages_are_not_required(self, runs: Runs) -> None:
        (runs.run / "parity.json").unlink()
        with runs.open() as workspace:
            require_stages(workspace, stage_named("bench"))
            require_stages(workspace, stage_named("report"))
            assert not (runs.run / "parity.json").exists()


def test_a_conditioning_file_counts_by_its_content(run_recipe: Path, tmp_path: Path) -> None:
    found = []
    for name, content in (("a", "1"), ("a", "2"), ("b", "2")):
        file = tmp_path / name
        file.write_text(content)
        recipe = load_recipe(run_recipe, [f"model.conditioning={file}"])
        with Workspace(tmp_path / "run", recipe) as workspace:
            found.append(recipe_with_digests(workspace)["model"]["conditioning"])
    assert found[0] != found[1] == found[2]


class TestCheckRecipe:
    def test_good(self, run_recipe: Path) -> None:
        recipe = load_recipe(run_recipe)
        check_recipe(recipe)
        assert recipe.evaluate.runner in recipe.compile.targets

    @pytest.mark.parametrize("key", ["model.conditioning", "evaluate.classifier"])
    def test_missing_file(self, run_recipe: Path, key: str) -> None:
        recipe = load_recipe(run_recipe, [f"{key}=gone.bin"])
        with pytest.raises(RecipeError, match=rf"gone\.bin: no such file\. Correct {key}"):
            check_recipe(recipe)

    def test_runner_that_is_not_compiled(self, run_recipe: Path) -> None:
        recipe = load_recipe(run_recipe, ["evaluate.runner=portable"])
        with pytest.raises(RecipeError, match=r"received portable, expected torch or one of .*ort"):
            check_recipe(recipe)
        check_recipe(load_recipe(run_recipe, ["evaluate.runner=torch"]))


class TestGates:
    met = GateResult.of("ort: sqnr_db", 50.0, 40.0, at_least=True)
    unmet = GateResult.of("ort: sqnr_db", 30.0, 40.0, at_least=True)
    too_high = GateResult.of("frechet_distance ratio", 2.0, 1.5, at_least=False)

    def test_met(self) -> None:
        check_gates([])
        check_gates([self.met])
        assert self.met.passed

    def test_unmet_are_named_with_both_numbers(self) -> None:
        with pytest.raises(GateError) as caught:
            check_gates([self.met, self.unmet, self.too_high])
        assert str(caught.value) == (
            "2 of 3 gates are not met: ort: sqnr_db: measured 30, required at least 40; "
            "frechet_distance ratio: measured 2, required at most 1.5."
        )
        assert caught.value.exit_status == 3

    def test_of_a_run(self, finished_run: Path) -> None:
        names = [gate.name for gate in gate_results(finished_run)]
        assert names
        assert {name.split(":")[0] for name in names} == {"ort", "ort_body"}
        assert gate_results(finished_run, ("quality.json",)) == []
        assert [gate.name for gate in gate_results(finished_run, ("parity.json",))] == names

    def test_nothing_measured(self, tmp_path: Path) -> None:
        assert gate_results(tmp_path) == []


class TestReproduceCommands:
    @pytest.fixture
    def make(self, run_recipe: Path, tmp_path: Path) -> Callable[..., str]:
        def make(recipe_path: str, *overrides: str) -> str:
            recipe = load_recipe(run_recipe)
            with Workspace(tmp_path / "my run", recipe, recipe_path, overrides) as workspace:
                return workspace.reproduce_commands()[-1]

        return make

    def test_can_be_pasted_into_a_shell(self, make: Callable[..., str]) -> None:
        assert make("r.yaml", "seed=1", "search.exclude=['*.ff.*']") == (
            "treeq-export run r.yaml --out 'my run' --set seed=1 "
            "--set 'search.exclude=['\"'\"'*.ff.*'\"'\"']'"
        )

    def test_without_a_recipe_file(self, make: Callable[..., str]) -> None:
        assert make("") == "treeq-export run RECIPE --out 'my run'"


class TestFinishedRun:
    """What a real run leaves."""

    @pytest.fixture
    def report(self, finished_run: Path) -> dict[str, Any]:
        return json.loads((finished_run / "report.json").read_text())

    def test_files(self, finished_run: Path) -> None:
        files = {str(path.relative_to(finished_run)) for path in finished_run.rglob("*.*")}
        assert files >= {
            "plan.json",
            "plan.safetensors",
            "finetune.json",
            "finetuned.safetensors",
            "compile.json",
            "parity.json",
            "bench.json",
            "quality.json",
            "report.json",
            "report.html",
            "run.json",
            "onnx/fp32/model.onnx",
            "onnx/ort/model.onnx",
            "samples/fp.png",
            "samples/quantized.png",
        }

    def test_keys_of_the_report(self, report: dict[str, Any]) -> None:
        promised = {"model", "plan", "quality", "parity", "bench", "size", "stages"}
        assert set(report) == promised | {"search", "finetune", "engines"}
        assert set(report["model"]) == {"name", "num_parameters", "num_quantized_layers"}
        assert set(report["plan"]) == {
            "average_weight_bits",
            "average_activation_bits",
            "branch_parameter_fraction",
        }
        quality = report["quality"]
        added = {"network_mse", "baseline"}
        assert set(quality) - added == {"fp", "quantized", "num_samples", "seed"}
        assert set(quality["fp"]) == {"frechet_distance", "class_accuracy"}
        assert set(quality["quantized"]) == {"frechet_distance", "class_accuracy", "psnr_db"}
        assert set(report["parity"]) == {"ort", "ort_body"}
        parity = report["parity"]["ort"]
        assert set(parity) == {"runtime", "passed", "sqnr_db", "max_abs_error", "layers"}
        for layer in parity["layers"]:
            assert set(layer) == {"name", "sqnr_db", "equal_code_fraction"}
        assert set(report["bench"]) == {"rows", "speedup", "environment"}
        for row in report["bench"]["rows"]:
            assert set(row) == {"target", "batch", "median_ms", "all_times_ms"}
        for speedup in report["bench"]["speedup"].values():
            assert set(speedup) == {"ratio", "low", "high"}
        assert set(report["size"]) == {"fp32_bytes", "ort"}

    def test_values_of_the_report(self, report: dict[str, Any], finished_run: Path) -> None:
        plan = json.loads((finished_run / "plan.json").read_text())
        assert report["model"]["num_quantized_layers"] == len(plan["layers"]) == 7
        assert report["plan"]["average_weight_bits"] == 4.0
        assert report["parity"]["ort"]["passed"] is True
        assert [layer["name"] for layer in report["parity"]["ort"]["layers"]] == [
            layer["name"] for layer in plan["layers"]
        ]
        assert {len(row["all_times_ms"]) for row in report["bench"]["rows"]} == {3}
        assert report["size"]["ort"] < report["size"]["fp32_bytes"]
        # The report's own time is known only after it has been written.
        assert set(report["stages"]) == ALL - {"report"}
        assert all(seconds >= 0 for seconds in report["stages"].values())

    @pytest.mark.slow
    def test_equal_bytes_in_another_process_and_folder(
        self, driver: Any, run_recipe: Path, finished_run: Path, tmp_path: Path
    ) -> None:
        recipe = tmp_path / "elsewhere" / "recipe.yaml"
        shutil.copytree(run_recipe.parent, recipe.parent)
        outcome = driver.run("run", recipe, "--out", tmp_path / "run")
        assert outcome.status == 0, outcome.stderr
        for file in (
            "plan.json",
            "plan.safetensors",
            "calibration.json",
            "finetuned.safetensors",
            "compile.json",
            "onnx/fp32/model.onnx",
            "onnx/ort/model.onnx",
            "parity.json",
        ):
            assert (tmp_path / "run" / file).read_bytes() == (finished_run / file).read_bytes()


class TestBadInputOnAFinishedRun:
    def test_a_format_that_does_not_fit_loses_nothing(self, runs: Runs, stages: FakeStages) -> None:
        files = {path for path in runs.run.rglob("*") if path.is_file()}
        stages.fail_in, stages.fail_early = "search", True
        with pytest.raises(TreeqError, match="broken"):
            runs("search.rotation_group=48")
        assert {path for path in runs.run.rglob("*") if path.is_file()} == files
        stages.fail_in = ""
        assert runs() == {"report"}

    def test_no_report_mixes_the_results_of_two_recipes(
        self, runs: Runs, stages: FakeStages
    ) -> None:
        stages.fail_in = "search"
        with pytest.raises(TreeqError, match="broken"):
            runs("search.rotation_group=48")
        with (
            runs.open("search.rotation_group=48") as workspace,
            pytest.raises(PlanError, match=r"search, which is out of date"),
        ):
            require_stages(workspace, stage_named("report"))

    def test_a_plan_that_a_killed_search_left_is_not_taken_for_that_of_the_old_recipe(
        self, runs: Runs, stages: FakeStages
    ) -> None:
        stages.fail_in = "search"
        with pytest.raises(TreeqError, match="broken"):
            runs("search.weight_bits=5")
        stages.fail_in = ""
        assert runs() == ALL
        assert load_plan(runs.run).layers[0].weight.bits == 4
