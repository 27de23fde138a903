"""What users get wrong, each in a process of its own: one line, status 1, nothing half written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from treeq_export.pipeline.workspace import Workspace
from treeq_export.recipe import load_recipe

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.0.attn1.to_q"  # K = 64
FIRST = "transformer_blocks.0.norm1.linear"


@pytest.fixture
def recipe(run_recipe: Path, tmp_path: Path) -> Path:
    """The recipe and its checkpoint, to spoil."""
    shutil.copytree(run_recipe.parent, tmp_path / "recipe")
    return tmp_path / "recipe" / "recipe.yaml"


@pytest.fixture
def checkpoint(recipe: Path) -> Path:
    return recipe.parent / "checkpoint"


@pytest.fixture
def finished(driver: Any, recipe: Path, finished_run: Path, tmp_path: Path) -> Path:
    """A finished run of `recipe`, to spoil."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    record = json.loads((run / "run.json").read_text())
    record["recipe"]["model"]["checkpoint"] = str(recipe.parent / "checkpoint")
    (run / "run.json").write_text(json.dumps(record))
    assert driver.run("report", "--run", run).status == 0
    return run


def edit_json(path: Path, edit: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def edit_weights(checkpoint: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    edit(tensors)
    save_file(tensors, checkpoint / WEIGHTS)


def check_refused(outcome: Any, *fragments: str, status: int = 1) -> None:
    assert outcome.status == status, outcome.stderr
    assert outcome.stdout == ""
    line = outcome.error
    for fragment in fragments:
        assert fragment in line
    assert line.endswith((".", "?")), line


class TestRecipe:
    @pytest.mark.parametrize(
        ("content", "fragments"),
        [
            ("", ["recipe.yaml: received NoneType, expected sections"]),
            ("- model\n- bench\n", ["recipe.yaml: received list, expected sections"]),
            ("model: [", ["recipe.yaml: not YAML: line 1, column 9: ", "Correct that, or"]),
            ("model: {checkpoint: checkpoint}", ["recipe.yaml: name: missing. Add it."]),
            ("name: a\nmodel: {}", ["model.checkpoint: missing. Add it."]),
            ("name: 3\nmodel: {checkpoint: c}", ["name: received 3"]),
        ],
        ids=["empty", "list", "not_yaml", "no_name", "no_checkpoint", "number_as_name"],
    )
    def test_content(
        self, driver: Any, recipe: Path, tmp_path: Path, content: str, fragments: list[str]
    ) -> None:
        recipe.write_text(content)
        check_refused(driver.run("run", recipe, "--out", tmp_path / "run"), *fragments)
        assert not (tmp_path / "run").exists()

    def test_binary_file(self, driver: Any, checkpoint: Path, tmp_path: Path) -> None:
        outcome = driver.run("run", checkpoint / WEIGHTS, "--out", tmp_path / "run")
        check_refused(outcome, f"{WEIGHTS}: larger than 262144 bytes")

    def test_folder_as_recipe(self, driver: Any, checkpoint: Path, tmp_path: Path) -> None:
        outcome = driver.run("run", checkpoint, "--out", tmp_path / "run")
        check_refused(outcome, f"{checkpoint}: cannot be read (Is a directory).")

    def test_missing_file(self, driver: Any, tmp_path: Path) -> None:
        outcome = driver.run("run", tmp_path / "gone.yaml", "--out", tmp_path / "run")
        check_refused(outcome, "gone.yaml: cannot be read (No such file or directory).")

    @pytest.mark.parametrize(
        ("setting", "fragments"),
        [
            ("serch.weight_bits=4", ["serch: unknown key. Did you mean search?"]),
            ("search.weight_bit=4", ["search.weight_bit: unknown key. Did you mean weight_bits?"]),
            ("search.branch.size=4", ["search.branch.size: unknown key. Known keys: b_in, b_out"]),
            ("validate.gate.x=1", ["validate.gate: unknown key. Did you mean gates?"]),
            ("search.weight_bits=9", ["search.weight_bits: received 9", "less than or equal to 8"]),
            ("search.weight_bits=1", ["search.weight_bits: received 1", "or equal to 2"]),
            ("search.weight_bits=4.5", ["search.weight_bits: received 4.5"]),
            ("search.activation_bits=0", ["search.activation_bits: received 0", "equal to 2"]),
            ("bench.rounds=2", ["bench.rounds: received 2", "or equal to 3"]),
            ("compile.targets=[]", ["compile.targets: received []"]),
            ("compile.targets=[tensort]", ["compile.targets.0: received 'tensort'", "'portable'"]),
            ("sampler.scheduler=euler", ["sampler.scheduler: received 'euler'"]),
            ("search.weight_bits", ["--set search.weight_bits: expected section.key=value."]),
            ("name.first=a", ["--set name.first=a: name is no section."]),
            ("seed=[", ["--set seed=[: not YAML"]),
            ("evaluate.runner=portable", ["evaluate.runner: received portable", "(ort)"]),
            ("evaluate.classifier=gone.onnx", ["gone.onnx: no such file.", "evaluate.classifier"]),
        ],
    )
    def test_setting(
        self, driver: Any, run_recipe: Path, tmp_path: Path, setting: str, fragments: list[str]
    ) -> None:
        outcome = driver.run("run", run_recipe, "--out", tmp_path / "run", "--set", setting)
        check_refused(outcome, *fragments)
        assert not (tmp_path / "run" / "plan.json").exists()

    @pytest.mark.parametrize(
        ("setting", "fragments"),
        [
            (
                "search.group_size=48",
                [f"{FIRST}: group_size 48 does not divide in_features 64.", "32 and 64"],
            ),
            (
                "search.rotation_group=48",
                [f"{FIRST}: rotation_group 48 is no power of two that divides", "32 and 64"],
            ),
            ("search.rotation_group=128", ["rotation_group 128", "The nearest that does is 64."]),
            ("search.branch.b_in=3", [f"{FIRST}: branch b_in 3 does not divide 64.", "2 and 4"]),
            ("search.branch.rank=65", ["branch rank 65 exceeds its block", "Use at most 64."]),
            ("search.exclude=['*']", ["search.exclude: leaves no layer", "Remove a pattern."]),
            ("search.exclude=[head]", ["search.exclude: 'head' matches none of 7 layers"]),
            ("model.latent_size=7", ["model.latent_size: received 7", "The nearest is 8."]),
        ],
    )
    def test_setting_that_does_not_fit_the_network(
        self, driver: Any, run_recipe: Path, tmp_path: Path, setting: str, fragments: list[str]
    ) -> None:
        run = tmp_path / "run"
        outcome = driver.run("run", run_recipe, "--out", run, "--set", setting)
        check_refused(outcome, *fragments)
        assert not (run / "plan.json").exists()


class TestCheckpoint:
    @pytest.mark.parametrize(
        ("spoil", "fragments"),
        [
            (lambda path: shutil.rmtree(path), ["checkpoint: no such file or folder."]),
            (lambda path: (path / WEIGHTS).unlink(), ["checkpoint: no weights.", WEIGHTS]),
            (
                lambda path: os.truncate(path / WEIGHTS, 100_000),
                [f"{WEIGHTS}: 100000 bytes that are no complete safetensors", "Download it again."],
            ),
            (lambda path: os.truncate(path / WEIGHTS, 5), [f"{WEIGHTS}: 5 bytes"]),
            (lambda path: (path / "config.json").unlink(), ["checkpoint: no config.json"]),
            (lambda path: os.truncate(path / "config.json", 20), ["config.json: not JSON"]),
            (
                lambda path: edit_json(
                    path / "config.json", lambda config: config.update(_class_name="UNet2DModel")
                ),
                [
                    "config.json: _class_name UNet2DModel is not supported.",
                    "Supported: DiTTransformer2DModel",
                ],
            ),
            (
                lambda path: edit_json(
                    path / "config.json",
                    lambda config: config.update(_class_name="DitTransformer2DModel"),
                ),
                ["Did you mean DiTTransformer2DModel?"],
            ),
            (
                lambda path: edit_weights(
                    path, lambda t: t[f"{LAYER}.weight"][0, :3].fill_(torch.nan)
                ),
                [f"{LAYER}.weight: 3 of 4096 weights are NaN or infinite."],
            ),
            (
                lambda path: edit_weights(path, lambda t: t[f"{LAYER}.bias"][:1].fill_(torch.inf)),
                [f"{LAYER}.bias: 1 of 64 weights are NaN or infinite."],
            ),
            (
                lambda path: edit_weights(path, lambda t: t.pop(f"{LAYER}.weight")),
                [f"{LAYER}.weight", "missing, one of 1 missing tensors"],
            ),
            (
                lambda path: edit_weights(
                    path, lambda t: t.update({f"{LAYER}.weight": torch.zeros(64, 32)})
                ),
                [f"{LAYER}.weight: received shape (64, 32), expected (64, 64)."],
            ),
        ],
        ids=[
            "gone",
            "no_weights",
            "truncated",
            "truncated_header",
            "no_config",
            "truncated_config",
            "unknown_class",
            "misspelt_class",
            "nan",
            "infinite",
            "missing_tensor",
            "wrong_shape",
        ],
    )
    def test_spoilt(
        self,
        driver: Any,
        recipe: Path,
        checkpoint: Path,
        tmp_path: Path,
        spoil: Callable[[Path], object],
        fragments: list[str],
    ) -> None:
        spoil(checkpoint)
        outcome = driver.run("run", recipe, "--out", tmp_path / "run")
        check_refused(outcome, *fragments)
        assert not (tmp_path / "run" / "plan.json").exists()
        check_refused(driver.run("inspect", "--checkpoint", checkpoint), *fragments)

    def test_without_a_quantizable_layer(
        self, driver: Any, recipe: Path, checkpoint: Path, tmp_path: Path
    ) -> None:
        edit_json(checkpoint / "config.json", lambda config: config.update(num_layers=0))

        def drop_blocks(tensors: dict[str, torch.Tensor]) -> None:
            for name in [name for name in tensors if name.startswith("transformer_blocks.")]:
                del tensors[name]

        edit_weights(checkpoint, drop_blocks)
        fragments = ("checkpoint: no quantizable layer", "Check num_layers in its config.json")
        check_refused(driver.run("run", recipe, "--out", tmp_path / "run"), *fragments)
        check_refused(driver.run("inspect", "--checkpoint", checkpoint), *fragments)

    def test_a_single_file(self, driver: Any, recipe: Path, tmp_path: Path) -> None:
        setting = f"model.checkpoint=checkpoint/{WEIGHTS}"
        outcome = driver.run("run", recipe, "--out", tmp_path / "run", "--set", setting)
        check_refused(outcome, f"{WEIGHTS}: received a .safetensors file, expected a folder")

    def test_another_one_between_two_runs(
        self, driver: Any, recipe: Path, checkpoint: Path, finished: Path
    ) -> None:
        plan = json.loads((finished / "plan.json").read_text())
        edit_weights(checkpoint, lambda tensors: tensors[f"{LAYER}.weight"].mul_(2))
        # A single stage refuses, and says what to do; nothing is removed.
        for stage in ("bench", "evaluate", "validate"):
            outcome = driver.run(stage, "--run", finished)
            check_refused(outcome, "search, which is out of date.", "`treeq-export search --run")
        assert (finished / "quality.json").is_file()
        # A run does everything again; here as far as the new plan.
        trap = {"stage": "compile", "on": "start", "count": 1, "action": "SIGINT"}
        outcome = driver.run("run", recipe, "--out", finished, trap=trap)
        check_refused(outcome, "interrupted", status=130)
        assert "up to date" not in outcome.stderr
        searched = json.loads((finished / "plan.json").read_text())
        assert searched["checkpoint_sha256"] != plan["checkpoint_sha256"]
        assert searched["tensors_sha256"] != plan["tensors_sha256"]
        assert not (finished / "report.json").exists()


class TestPlan:
    @pytest.mark.parametrize(
        ("edit", "fragments"),
        [
            (
                lambda plan: plan.update(format_version=2),
                ["plan.json: format_version 2, expected 1.", "search again"],
            ),
            (
                lambda plan: plan.update(checkpoint_sha256="0" * 64),
                ["plan.json: belongs to checkpoint 000000000000, received"],
            ),
            (
                lambda plan: plan["layers"][2]["weight"].update(bits=9),
                ["plan.json: layers.2.weight.bits", "less than or equal to 8 (received 9)"],
            ),
            (
                lambda plan: plan["layers"][2].update(weigth={}),
                ["plan.json: layers.2.weigth", "not permitted"],
            ),
            (
                lambda plan: plan["layers"][1].update(rotation_group=24),
                [f"{LAYER}: rotation_group 24 is no power of two", "16 and 32"],
            ),
            (
                lambda plan: plan["layers"][1]["weight"].update(group_size=24),
                [f"{LAYER}: group_size 24 does not divide in_features 64.", "16 and 32"],
            ),
            (
                lambda plan: plan["layers"][1].update(name="blocks.7.fc"),
                ["blocks.7.fc"],
            ),
        ],
        ids=["newer", "other_checkpoint", "bits", "key", "rotation", "group", "layer"],
    )
    def test_edited_beyond_use(
        self,
        driver: Any,
        recipe: Path,
        finished: Path,
        edit: Callable[[Any], object],
        fragments: list[str],
    ) -> None:
        edit_json(finished / "plan.json", edit)
        check_refused(driver.run("run", recipe, "--out", finished), *fragments)
        check_refused(driver.run("calibrate", "--run", finished), *fragments)

    @pytest.mark.slow
    def test_edited_by_hand(self, driver: Any, recipe: Path, finished: Path) -> None:
        def widen(plan: Any) -> None:
            plan["layers"][1]["weight"]["bits"] = 8

        edit_json(finished / "plan.json", widen)
        outcome = driver.run("bench", "--run", finished)
        check_refused(outcome, "calibrate, which is out of date.")
        outcome = driver.run("run", recipe, "--out", finished, "--json")
        assert outcome.status == 0, outcome.stderr
        assert "search     up to date\ncalibrate  ...\n" in outcome.stderr
        report = json.loads(outcome.stdout)
        assert report["plan"]["average_weight_bits"] > 4
        assert report["parity"]["ort"]["passed"] is True

    def test_before_search(self, driver: Any, tmp_path: Path) -> None:
        outcome = driver.run("inspect", "--run", tmp_path)
        check_refused(outcome, "plan.json: no plan. Run `treeq-export search --run")


class TestOutputFolder:
    def test_is_a_file(self, driver: Any, run_recipe: Path, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("precious")
        outcome = driver.run("run", run_recipe, "--out", tmp_path / "run")
        check_refused(outcome, "run: cannot be written (File exists). Choose another --out folder.")
        assert (tmp_path / "run").read_text() == "precious"

    def test_below_a_file(self, driver: Any, run_recipe: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        outcome = driver.run("run", run_recipe, "--out", tmp_path / "file" / "run")
        check_refused(outcome, "run: cannot be written (Not a directory). Choose another --out")

    def test_not_writable(self, driver: Any, run_recipe: Path) -> None:
        # A folder of the kernel's, where root cannot create files either.
        outcome = driver.run("run", run_recipe, "--out", "/proc/self")
        check_refused(outcome, "/proc/self: cannot be written (", "Choose another --out folder.")
        outcome = driver.run("search", "--run", "/proc/self", "--recipe", run_recipe)
        check_refused(outcome, "/proc/self: cannot be written (", "Choose another --out folder.")

    def test_folder_in_place_of_a_file(self, driver: Any, run_recipe: Path, finished: Path) -> None:
        (finished / "report.html").unlink()
        (finished / "report.html" / "mine").mkdir(parents=True)
        outcome = driver.run("run", run_recipe, "--out", finished)
        check_refused(outcome, "report.html", "Is a directory")

    def test_no_run_in_it(self, driver: Any, tmp_path: Path) -> None:
        stages = ("search", "calibrate", "finetune", "compile", "validate", "bench", "evaluate")
        for command in stages:
            outcome = driver.run(command, "--run", tmp_path / "run")
            check_refused(outcome, "run.json: missing. Run `treeq-export run RECIPE --out")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"stages": {}}'])
    def test_corrupt_record(self, driver: Any, recipe: Path, finished: Path, content: str) -> None:
        (finished / "run.json").write_text(content)
        fragments = ("Remove it and run",)
        check_refused(driver.run("run", recipe, "--out", finished), *fragments)
        check_refused(driver.run("bench", "--run", finished), *fragments)

    def test_another_process_at_work(self, driver: Any, run_recipe: Path, finished: Path) -> None:
        fragments = ("another treeq-export is at work in it. Wait for it, or choose another",)
        with Workspace(finished, load_recipe(run_recipe)):
            check_refused(driver.run("run", run_recipe, "--out", finished), *fragments)
            check_refused(driver.run("validate", "--run", finished), *fragments)
            assert driver.run("inspect", "--run", finished).status == 0
        assert driver.run("validate", "--run", finished).status == 0


class TestResults:
    """Damaged results of finished stages are made again."""

    @pytest.mark.slow
    def test_several_at_once(self, driver: Any, recipe: Path, finished: Path) -> None:
        whole = (finished / "onnx/ort/model.onnx").read_bytes()
        os.truncate(finished / "onnx/ort/model.onnx", 1000)
        (finished / "quality.json").unlink()
        (finished / "bench.json").write_text("{}")
        outcome = driver.run("run", recipe, "--out", finished)
        assert outcome.status == 0, outcome.stderr
        assert "finetune   up to date\ncompile    ...\n" in outcome.stderr
        assert (finished / "onnx/ort/model.onnx").read_bytes() == whole
        assert json.loads((finished / "bench.json").read_text())["rows"]

    def test_damaged_record_and_no_run(self, driver: Any, finished: Path) -> None:
        (finished / "parity.json").write_text('{"targets": 3}')
        outcome = driver.run("report", "--run", finished)
        check_refused(outcome, "parity.json", "treeq-export validate")
