import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from treeq_export.artefacts import atomic_path
from treeq_export.errors import CheckpointError, OutputError, PlanError
from treeq_export.model.checkpoint import open_checkpoint
from treeq_export.pipeline.workspace import StageRecord, Workspace, read_run
from treeq_export.plan import ModelRecord, Plan, StrategyRecord, save_plan
from treeq_export.recipe import Recipe, load_recipe

STAGE = StageRecord(fingerprint="f", seconds=1.5, outputs={"plan.json": "0" * 64})


@pytest.fixture
def recipe(run_recipe: Path) -> Recipe:
    return load_recipe(run_recipe)


def save_empty_plan(run: Path, checkpoint_sha256: str, name: str = "tiny") -> Plan:
    return save_plan(
        run,
        Plan(
            format_version=1,
            model=ModelRecord(name=name, class_name="DiT", num_parameters=1),
            checkpoint_sha256=checkpoint_sha256,
            strategy=StrategyRecord(name="uniform", options={}),
            layers=(),
        ),
        {},
    )


class TestRunRecord:
    def test_comes_back_as_it_was_saved(self, recipe: Recipe, tmp_path: Path) -> None:
        overrides = ("seed=1", "search.exclude=['*.ff.*']")
        with Workspace(tmp_path / "run", recipe, "r.yaml", overrides) as workspace:
            workspace.stages["search"] = STAGE
            workspace.save()
        with Workspace.reopen(tmp_path / "run") as reopened:
            assert reopened.recipe == recipe
            assert reopened.recipe_path == "r.yaml"
            assert reopened.overrides == overrides
            assert reopened.stages == {"search": STAGE}

    def test_new_recipe_keeps_the_finished_stages(self, recipe: Recipe, tmp_path: Path) -> None:
        with Workspace(tmp_path, recipe) as workspace:
            workspace.stages["search"] = STAGE
            workspace.save()
        other = recipe.model_copy(update={"seed": 7})
        with Workspace(tmp_path, other) as workspace:
            assert workspace.stages == {"search": STAGE}
            workspace.save()
        assert read_run(tmp_path).recipe["seed"] == 7

    def test_missing_names_the_command(self, tmp_path: Path) -> None:
        with pytest.raises(PlanError, match=r"run\.json: missing\. Run `treeq-export run RECIPE"):
            Workspace.reopen(tmp_path / "nothing")
        assert not (tmp_path / "nothing").exists()

    def test_a_file_in_the_place_of_a_run_folder_is_refused(self, tmp_path: Path) -> None:
        graph = tmp_path / "model.onnx"
        graph.write_bytes(b"made elsewhere")
        with pytest.raises(PlanError, match=r"model\.onnx: received a file, expected a run folder"):
            read_run(graph)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda _: b"",
            lambda text: text[: len(text) // 2],
            lambda _: b"\xff\xfe",
            lambda _: b"[]",
            lambda text: json.dumps(json.loads(text) | {"more": 1}).encode(),
            lambda text: json.dumps(json.loads(text) | {"stages": {"search": {}}}).encode(),
        ],
        ids=["empty", "truncated", "binary", "list", "unknown_key", "stage_without_fields"],
    )
    def test_malformed_is_refused_and_the_folder_given_free(
        self, recipe: Recipe, tmp_path: Path, damage: Callable[[bytes], bytes]
    ) -> None:
        file = tmp_path / "run.json"
        with Workspace(tmp_path, recipe) as workspace:
            workspace.save()
        file.write_bytes(damage(file.read_bytes()))
        expected = r"run\.json: .+\. Remove it and run"
        with pytest.raises(PlanError, match=expected):
            Workspace(tmp_path, recipe)
        with pytest.raises(PlanError, match=expected):
            Workspace.reopen(tmp_path)
        file.unlink()
        with Workspace(tmp_path, recipe) as workspace:
            assert workspace.stages == {}

    def test_recipe_of_another_version_is_refused(self, recipe: Recipe, tmp_path: Path) -> None:
        with Workspace(tmp_path, recipe) as workspace:
            workspace.save()
        record = json.loads((tmp_path / "run.json").read_text())
        record["recipe"]["bench"]["laps"] = 3
        (tmp_path / "run.json").write_text(json.dumps(record))
        with pytest.raises(
            PlanError,
            match=r"run\.json: bench\.laps: Extra inputs .*Remove it and run",
        ):
            Workspace.reopen(tmp_path)


class TestFolder:
    def test_one_process_at_a_time(self, recipe: Recipe, tmp_path: Path) -> None:
        with (
            Workspace(tmp_path, recipe),
            pytest.raises(OutputError, match="another treeq-export is at work in it"),
        ):
            Workspace(tmp_path, recipe)
        with Workspace(tmp_path, recipe) as workspace:
            assert workspace.run == tmp_path

    def test_only_own_temporaries_are_removed_and_only_in_the_folder(
        self, recipe: Recipe, tmp_path: Path
    ) -> None:
        (tmp_path / ".treeq-1-abcdefgh.partial").mkdir()
        kept = [".git.partial", "nested", "nested/.treeq-1-abcdefgh.partial"]
        for name in kept:
            (tmp_path / name).mkdir()
        files = [".model.99.partial.onnx", "nested/.movie.mkv.partial"]
        for name in files:
            (tmp_path / name).write_text("x")
        with Workspace(tmp_path, recipe):
            found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
            assert found == {".lock", *kept, *files}

    def test_temporaries_beside_finished_samples_are_removed(
        self, recipe: Recipe, tmp_path: Path
    ) -> None:
        left = tmp_path / "samples" / ".treeq-1-killed.partial"
        left.mkdir(parents=True)
        with Workspace(tmp_path, recipe):
            assert list(left.parent.iterdir()) == []

    def test_a_refused_process_removes_nothing(self, recipe: Recipe, tmp_path: Path) -> None:
        with Workspace(tmp_path, recipe), atomic_path(tmp_path / "plan.json") as temporary:
            temporary.write_text("{")
            with pytest.raises(OutputError):
                Workspace(tmp_path, recipe)
            assert temporary.is_file()

    @pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "fifo"])
    @pytest.mark.parametrize("read_only", [False, True])
    def test_a_lock_is_a_regular_file(
        self, recipe: Recipe, tmp_path: Path, kind: str, read_only: bool
    ) -> None:
        run, victim = tmp_path / "run", tmp_path / "victim.txt"
        with Workspace(run, recipe) as workspace:
            workspace.save()
        (run / ".lock").unlink()
        if kind == "folder":
            (run / ".lock").mkdir()
        elif kind == "fifo":
            os.mkfifo(run / ".lock")
        else:
            (run / ".lock").symlink_to(victim)
        if kind == "link":
            victim.write_text("important")
        with pytest.raises(OutputError, match=r"\.lock: received a link or a special file"):
            Workspace.reopen(run, read_only=read_only)
        assert victim.exists() == (kind == "link")
        assert kind != "link" or victim.read_text() == "important"

    def test_a_lock_is_not_emptied(self, recipe: Recipe, tmp_path: Path) -> None:
        (tmp_path / "text").write_text("important")
        (tmp_path / ".lock").hardlink_to(tmp_path / "text")
        with Workspace(tmp_path, recipe):
            assert (tmp_path / "text").read_text() == "important"

    def test_linked_run_record_is_replaced(self, recipe: Recipe, tmp_path: Path) -> None:
        run, other = tmp_path / "run", tmp_path / "other.json"
        with Workspace(run, recipe) as workspace:
            workspace.save()
        other.write_bytes(before := (run / "run.json").read_bytes())
        (run / "run.json").unlink()
        (run / "run.json").symlink_to(other)
        with Workspace.reopen(run) as workspace:
            workspace.stages["search"] = STAGE
            workspace.save()
        assert other.read_bytes() == before
        assert not (run / "run.json").is_symlink()

    def test_a_file_in_its_place(self, recipe: Recipe, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("")
        with pytest.raises(OutputError, match=r"run: cannot be written \(File exists\)"):
            Workspace(tmp_path / "run", recipe)


class TestReadOnly:
    def test_nothing_is_written(self, recipe: Recipe, tmp_path: Path) -> None:
        with Workspace(tmp_path, recipe) as workspace:
            workspace.save()
        (tmp_path / ".lock").unlink()
        (tmp_path / ".treeq-1-abcdefgh.partial").mkdir()
        before = {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.iterdir())}
        with Workspace.reopen(tmp_path, read_only=True) as workspace:
            assert workspace.recipe == recipe
        assert {p: p.stat().st_mtime_ns for p in (tmp_path, *tmp_path.iterdir())} == before

    def test_readers_may_be_several_but_not_beside_a_writer(
        self, recipe: Recipe, tmp_path: Path
    ) -> None:
        with Workspace(tmp_path, recipe) as workspace:
            workspace.save()
            with pytest.raises(OutputError, match="another treeq-export is at work"):
                Workspace.reopen(tmp_path, read_only=True)
        with (
            Workspace.reopen(tmp_path, read_only=True),
            Workspace.reopen(tmp_path, read_only=True),
            pytest.raises(OutputError, match="another treeq-export is at work"),
        ):
            Workspace.reopen(tmp_path)

    def test_a_writer_says_what_helps(
        self, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Workspace(tmp_path, recipe) as workspace:
            workspace.save()

        def refuse(**_: object) -> str:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(tempfile, "mkdtemp", refuse)
        with pytest.raises(OutputError, match="Make it writable, or copy the folder"):
            Workspace.reopen(tmp_path)


class TestWhatIsLoaded:
    def test_once(self, recipe: Recipe, tmp_path: Path) -> None:
        with Workspace(tmp_path, recipe) as workspace:
            assert workspace.denoiser is workspace.denoiser
            assert workspace.denoiser.class_name == workspace.checkpoint.class_name
            saved = save_empty_plan(tmp_path, workspace.checkpoint.sha256)
            assert workspace.plan == saved
            assert workspace.tensors == {}

    def test_forgotten_plan_is_read_again(self, recipe: Recipe, tmp_path: Path) -> None:
        with Workspace(tmp_path, recipe) as workspace:
            workspace.forget(["plan.json"])
            first = save_empty_plan(tmp_path, workspace.checkpoint.sha256)
            assert workspace.plan == first
            assert workspace.tensors == {}
            second = save_empty_plan(tmp_path, workspace.checkpoint.sha256, name="other")
            assert workspace.plan == first
            workspace.forget(["bench.json"])
            assert workspace.plan == first
            workspace.forget(["finetune.json"])
            assert workspace.plan == second

    def test_plan_of_another_checkpoint(self, recipe: Recipe, tmp_path: Path) -> None:
        save_empty_plan(tmp_path, "0" * 64)
        with (
            Workspace(tmp_path, recipe) as workspace,
            pytest.raises(PlanError, match="belongs to checkpoint 000000000000, received"),
        ):
            _ = workspace.plan

    def test_missing_checkpoint(self, recipe: Recipe, tmp_path: Path) -> None:
        section: Any = recipe.model.model_copy(update={"checkpoint": str(tmp_path / "gone")})
        with (
            Workspace(tmp_path, recipe.model_copy(update={"model": section})) as workspace,
            pytest.raises(CheckpointError, match="gone: no such file or folder"),
        ):
            _ = workspace.denoiser

    def test_checkpoint_is_that_of_the_recipe(
        self, recipe: Recipe, run_recipe: Path, tmp_path: Path
    ) -> None:
        with Workspace(tmp_path, recipe) as workspace:
            expected = open_checkpoint(run_recipe.parent / "checkpoint").sha256
            assert workspace.checkpoint.sha256 == expected

    def test_sibling_shares_what_is_loaded(self, recipe: Recipe, tmp_path: Path) -> None:
        other = recipe.model_copy(update={"seed": 7})
        with (
            Workspace(tmp_path / "one", recipe, "r.yaml", ("seed=7",)) as workspace,
            workspace.sibling(tmp_path / "two", other) as sibling,
        ):
            assert sibling.denoiser is workspace.denoiser
            assert sibling.checkpoint is workspace.checkpoint
            assert (sibling.recipe.seed, sibling.recipe_path) == (7, "r.yaml")
            assert sibling.fp_samples == tmp_path / "one" / "samples"
            assert sibling.say is workspace.say
            with pytest.raises(OutputError, match="another treeq-export is at work"):
                Workspace(tmp_path / "two", other)
