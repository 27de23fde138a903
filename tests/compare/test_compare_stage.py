"""Running a comparison: cells are runs that go on where they were stopped."""

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.commands import LEAST_WORK
from treeq_export.cli import main
from treeq_export.compare import peer_cells, stage
from treeq_export.errors import TreeqError
from treeq_export.model.trajectories import Rows
from treeq_export.model.zoo import Denoiser
from treeq_export.pipeline import run as pipeline
from treeq_export.pipeline.workspace import read_run
from treeq_export.records import CompareRecord, load_record

SETTINGS = ("evaluate.seeds=[0,1,2]", *LEAST_WORK)
PEER = "modelopt_int8_max"


def compare(recipe: Path, out: Path, *args: str, settings: Sequence[str] = SETTINGS) -> Result:
    words = ["compare", str(recipe), "--out", str(out), *args]
    for setting in settings:
        words += ["--set", setting]
    return CliRunner().invoke(main, words, env={"COLUMNS": "200"})


def table_of(out: Path) -> CompareRecord:
    return load_record(out / "compare.json", CompareRecord, "compare")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The views have their own tests."""
    monkeypatch.setattr(stage, "draw_png", lambda _: b"png")
    monkeypatch.setattr(stage, "render_comparison", lambda *_: "page")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Cell and stage of every stage that is run."""
    ran: list[tuple[str, str]] = []
    run_stage = pipeline.run_stage

    def count(run: Any, which: Any, on_step: Callable[[float], None]) -> object:
        ran.append((run.run.name, which.name))
        return run_stage(run, which, on_step)

    monkeypatch.setattr(pipeline, "run_stage", count)
    return ran


@pytest.fixture
def fake_peer(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The other toolkit: it leaves the model as it is; gives the layers of each call."""
    calls: list[list[str]] = []

    def quantize(_name: str, denoiser: Denoiser, layers: Sequence[str], rows: Rows) -> Denoiser:
        assert len(next(iter(rows.values()))) == 4
        calls.append(list(layers))
        return copy.deepcopy(denoiser)

    monkeypatch.setattr(peer_cells, "quantize_with_peer", quantize)
    return calls


class TestRunning:
    def test_cells_rows_and_what_they_share(
        self, run_recipe: Path, tmp_path: Path, runs: list[tuple[str, str]]
    ) -> None:
        out = tmp_path / "table"
        args = ("--budgets", "3,4", "--strategies", "uniform", "--finetune", "peft")
        result = compare(run_recipe, out, *args)
        assert result.exit_code == 0, result.output
        names = ["uniform-3", "uniform-3-peft", "uniform-4", "uniform-4-peft"]
        assert result.stderr.count("[") == 4
        assert "[4/4] uniform-4-peft: W4.00 A4.00, network MSE" in result.stderr
        assert "fake-quantized in PyTorch" in result.stdout
        record = table_of(out)
        assert [row.name for row in record.rows] == names
        assert record.pending == []
        assert (record.num_samples, record.seeds) == (2, [0, 1, 2])
        first, trained = record.rows[:2]
        assert (first.budget, first.weight_bits, first.activation_bits) == (3.0, 3.0, 3.0)
        assert (first.variant, trained.variant) == ("ptq", "peft")
        assert first.network_mse is not None
        assert first.network_mse > 0
        assert first.psnr_db is not None
        assert len(first.psnr_db.values) == 3
        assert first.frechet_distance is None  # the recipe names no classifier
        # The trained cell has the untrained one's search and calibration.
        assert set(first.seconds) == {"search", "calibrate", "evaluate"}
        assert set(trained.seconds) == {"search", "calibrate", "finetune", "evaluate"}
        ran = [run for run in runs if run[0].startswith("uniform-3")]
        assert ran == [
            ("uniform-3", "search"),
            ("uniform-3", "calibrate"),
            ("uniform-3", "finetune"),
            ("uniform-3", "evaluate"),
            ("uniform-3-peft", "finetune"),
            ("uniform-3-peft", "evaluate"),
        ]
        base, own = (read_run(out / "cells" / name).stages for name in names[:2])
        assert base["calibrate"] == own["calibrate"]
        # Full precision is sampled once, and nothing is compiled.
        shared = sorted(path.name for path in (out / "samples").iterdir())
        assert shared == [f"fp_seed{seed}.safetensors" for seed in (0, 1, 2)]
        assert not list(out.rglob("fp_seed0.safetensors"))[1:]
        assert not list(out.rglob("*.onnx"))
        assert (out / "compare.html").read_text() == "page"
        assert (out / "compare.png").read_bytes() == b"png"

    def test_again_does_nothing_and_rows_stay(
        self, run_recipe: Path, tmp_path: Path, runs: list[tuple[str, str]]
    ) -> None:
        compare(run_recipe, tmp_path, "--budgets", "3", "--strategies", "uniform")
        before = table_of(tmp_path)
        runs.clear()
        args = ("--budgets", "3", "--strategies", "uniform", "--json")
        result = compare(run_recipe, tmp_path, *args)
        assert runs == []
        assert "uniform-3: up to date" in result.stderr
        assert table_of(tmp_path).rows == before.rows
        assert json.loads(result.stdout)["rows"][0]["name"] == "uniform-3"
        compare(run_recipe, tmp_path, "--budgets", "4", "--strategies", "uniform")
        assert {name for name, _ in runs} == {"uniform-4"}
        assert [row.name for row in table_of(tmp_path).rows] == ["uniform-4", "uniform-3"]

    def test_a_changed_row_is_made_again(
        self, run_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))  # part of the environment
        args = ("--budgets", "3", "--strategies", "uniform")
        compare(run_recipe, tmp_path, *args)
        before = table_of(tmp_path)
        path = tmp_path / "compare.json"
        path.write_text(path.read_text().replace('"weight_bits": 3', '"weight_bits": 2'))
        result = compare(run_recipe, tmp_path, *args)
        assert f"{path}: damaged" in result.stderr
        assert table_of(tmp_path) == before

    def test_goes_on_after_a_failure(
        self,
        run_recipe: Path,
        tmp_path: Path,
        runs: list[tuple[str, str]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        evaluate = pipeline.stage_named("evaluate").execute

        def fail(workspace: Any, on_step: Callable[[float], None]) -> object:
            if workspace.run.name == "uniform-4":
                raise TreeqError("the power is gone.")
            return evaluate(workspace, on_step)

        broken = tuple(
            dataclasses.replace(each, execute=fail) if each.name == "evaluate" else each
            for each in pipeline.STAGES
        )
        args = ("--budgets", "3,4,5", "--strategies", "uniform")
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "STAGES", broken)
            result = compare(run_recipe, tmp_path, *args)
        assert result.exit_code == 1
        assert "treeq-export: the power is gone." in result.stderr
        record = table_of(tmp_path)
        assert [row.name for row in record.rows] == ["uniform-3"]
        assert record.pending == ["uniform-4", "uniform-5"]
        runs.clear()
        assert compare(run_recipe, tmp_path, *args).exit_code == 0
        assert runs[0] == ("uniform-4", "evaluate")
        assert {name for name, _ in runs} == {"uniform-4", "uniform-5"}
        assert table_of(tmp_path).pending == []

    def test_rows_of_another_version_are_not_kept(
        self, run_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compare(run_recipe, tmp_path, "--budgets", "3", "--strategies", "uniform")
        monkeypatch.setattr(stage, "__version__", "9.9")
        compare(run_recipe, tmp_path, "--budgets", "4", "--strategies", "uniform")
        record = table_of(tmp_path)
        assert record.version == "9.9"
        assert [row.name for row in record.rows] == ["uniform-4"]

    def test_seeds_of_the_command_line(self, run_recipe: Path, tmp_path: Path) -> None:
        args = ("--budgets", "3", "--strategies", "uniform", "--seeds", "5")
        assert compare(run_recipe, tmp_path, *args).exit_code == 0
        record = table_of(tmp_path)
        assert record.seeds == [5]
        assert record.rows[0].psnr_db is not None
        assert record.rows[0].psnr_db.std is None


class TestPeers:
    ARGS = ("--budgets", "3", "--strategies", "uniform", "--peers", PEER)

    def test_row_of_a_peer(
        self, run_recipe: Path, tmp_path: Path, fake_peer: list[list[str]]
    ) -> None:
        settings = (*SETTINGS, "search.exclude=['*attn1*']")
        result = compare(run_recipe, tmp_path, *self.ARGS, settings=settings)
        assert result.exit_code == 0, result.output
        row = table_of(tmp_path).rows[1]
        assert (row.name, row.peer, row.description) == (f"peer-{PEER}", True, "W8 A8")
        assert (row.budget, row.weight_bits, row.branch_parameter_fraction) == (None, 8.0, None)
        assert row.network_mse == pytest.approx(0.0, abs=1e-10)  # other batches, other rounding
        assert set(row.seconds) == {"calibrate", "evaluate"}
        [layers] = fake_peer
        assert layers
        assert not any("attn1" in name for name in layers)

    def test_is_not_measured_again(
        self, run_recipe: Path, tmp_path: Path, fake_peer: list[list[str]]
    ) -> None:
        compare(run_recipe, tmp_path, *self.ARGS)
        result = compare(run_recipe, tmp_path, *self.ARGS)
        assert f"peer-{PEER}: up to date" in result.stderr
        assert len(fake_peer) == 1
        (tmp_path / "cells" / f"peer-{PEER}" / "quality.json").write_text("{}")
        compare(run_recipe, tmp_path, *self.ARGS)
        assert len(fake_peer) == 2


class TestBadInput:
    ARGS = ("--budgets", "3", "--strategies", "uniform")

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--budgets", "3", "--strategies", "best"], "received 'best', expected some of"),
            (["--budgets", "9"], "received '9', expected average bits from 2 to 8"),
            (["--budgets", "1.5"], "received '1.5', expected average bits from 2 to 8"),
            (["--budgets", "many"], "received 'many', expected average bits from 2 to 8"),
            (["--budgets", "3", "--finetune", "lora"], "expected some of none, peft, qat"),
            (["--budgets", "3", "--peers", "other"], "received 'other', expected some of model"),
            (["--budgets", "3", "--seeds", "one"], "received 'one', expected integers"),
            (["--strategies", "tss"], "Missing option '--budgets'"),
        ],
    )
    def test_wrong_usage(
        self, run_recipe: Path, tmp_path: Path, args: list[str], message: str
    ) -> None:
        result = compare(run_recipe, tmp_path / "out", *args)
        assert result.exit_code == 2
        assert message in result.stderr
        assert not (tmp_path / "out").exists()

    def refuse(self, result: Result) -> str:
        assert result.exit_code == 1
        assert result.stdout == ""
        lines = result.stderr.splitlines()
        assert [line for line in lines if line.startswith("treeq-export: ")] == lines[-1:]
        return lines[-1]

    def test_too_few_seeds(self, run_recipe: Path, tmp_path: Path) -> None:
        result = compare(run_recipe, tmp_path / "out", *self.ARGS, settings=())
        assert "evaluate.seeds: received 0, expected at least 3" in self.refuse(result)
        assert not (tmp_path / "out").exists()

    def test_folder_of_another_recipe(self, run_recipe: Path, tmp_path: Path) -> None:
        compare(run_recipe, tmp_path, *self.ARGS)
        before = (tmp_path / "compare.json").read_bytes()
        other = (*SETTINGS, "calibrate.num_clip_steps=5")
        line = self.refuse(compare(run_recipe, tmp_path, *self.ARGS, settings=other))
        assert "another recipe: calibrate.num_clip_steps was 4, is 5. Choose another" in line
        line = self.refuse(
            compare(run_recipe, tmp_path, *self.ARGS, settings=(*SETTINGS, "seed=7"))
        )
        assert "another recipe: seed was 0, is 7." in line
        assert (tmp_path / "compare.json").read_bytes() == before

    def test_folder_of_a_run(self, run_recipe: Path, tmp_path: Path) -> None:
        (tmp_path / "run.json").write_text("{}")
        line = self.refuse(compare(run_recipe, tmp_path, *self.ARGS))
        assert line.endswith("is the folder of a run. Choose another --out.")

    def test_table_that_is_none(self, run_recipe: Path, tmp_path: Path) -> None:
        (tmp_path / "compare.json").write_text("{}")
        line = self.refuse(compare(run_recipe, tmp_path, *self.ARGS))
        assert "compare.json: not what this treeq-export writes. Remove it" in line

    def test_missing_recipe(self, tmp_path: Path) -> None:
        line = self.refuse(compare(tmp_path / "gone.yaml", tmp_path / "out", *self.ARGS))
        assert "gone.yaml: cannot be read" in line
