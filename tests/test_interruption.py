"""Every stage is interrupted, killed and run out of disk in a process of its own, then finished.

Each stage starts from a folder in which all stages before it have finished. It then meets a full
disk, Ctrl-C and kill -9, in this order, and at last runs undisturbed.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf.message import DecodeError
from onnx.checker import ValidationError
from PIL import Image
from safetensors import SafetensorError, safe_open

from treeq_export.pipeline.stages import STAGE_NAMES

# The n-th renaming is missing: a file or folder is complete, but not in its place. Of calibrate,
# finetune, compile, evaluate and report others already are.
KILLED_BEFORE_FILE = {
    "search": 1,
    "calibrate": 3,
    "finetune": 3,
    "compile": 2,
    "validate": 1,
    "bench": 1,
    "evaluate": 2,
    "report": 2,
}
LIMIT_BYTES = 100  # less than any file of a stage


def rewind(run: Path, stage: str) -> None:
    """Bring a finished run to the state before a stage."""
    record = json.loads((run / "run.json").read_text())
    later = STAGE_NAMES[STAGE_NAMES.index(stage) :]
    for name in later:
        for file in record["stages"].pop(name)["outputs"]:
            if file != "plan.json":
                (run / file).unlink()
    (run / "run.json").write_text(json.dumps(record))
    if stage in ("search", "calibrate"):
        plan = json.loads((run / "plan.json").read_text())
        (run / "plan.json").write_text(json.dumps(plan | {"tensors_sha256": None}))
    if stage == "search":
        (run / "plan.json").unlink()
    shutil.rmtree(run / "samples")
    if stage != "report":
        shutil.rmtree(run / "onnx" / "ort_int8", ignore_errors=True)


def find_half_written(run: Path) -> list[str]:
    """Return the files under a final name that cannot be read to their end."""
    return [
        str(path.relative_to(run))
        for path in sorted(run.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(run).parts)
        and not is_complete(path)
    ]


def is_complete(path: Path) -> bool:
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118
                    file.get_tensor(name)
        elif path.suffix == ".onnx":
            onnx.checker.check_model(onnx.load(path))
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.verify()
        elif path.suffix == ".html":
            return path.read_text().rstrip().endswith("</html>")
    except (ValueError, SafetensorError, OSError, SyntaxError, DecodeError, ValidationError):
        return False
    return True


def find_temporaries(run: Path) -> list[Path]:
    return [path for path in run.rglob("*") if ".partial" in path.name]


def read_stages(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())["stages"]


@dataclass(frozen=True)
class Accident:
    """How a run ended and what it left."""

    outcome: Any
    half_written: list[str]
    stages: dict[str, Any]


@dataclass(frozen=True)
class History:
    """What happened to one stage."""

    stage: str
    run: Path
    before: dict[str, Any]
    times_ns: dict[Path, int]
    full_disk: Accident
    interrupted: Accident
    killed: Accident
    finished: Any

    @property
    def earlier(self) -> tuple[str, ...]:
        return STAGE_NAMES[: STAGE_NAMES.index(self.stage)]


# After these two stages little is left to do.
QUICK = ("evaluate", "report")
PARAMS = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in STAGE_NAMES
]


@pytest.fixture(scope="module", params=PARAMS)
def history(
    request: pytest.FixtureRequest,
    driver: Any,
    run_recipe: Path,
    finished_run: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> History:
    stage: str = request.param
    run = tmp_path_factory.mktemp(stage) / "run"
    shutil.copytree(finished_run, run)
    rewind(run, stage)
    before = read_stages(run)
    files = [run / file for record in before.values() for file in record["outputs"]]
    kept = [path for path in files if path.name != "plan.json"]
    times_ns = {path: path.stat().st_mtime_ns for path in kept}

    def meet(on: str, count: int, action: str | int) -> Accident:
        trap = {"stage": stage, "on": on, "count": count, "action": action}
        outcome = driver.run("run", run_recipe, "--out", run, trap=trap)
        return Accident(outcome, find_half_written(run), read_stages(run))

    return History(
        stage,
        run,
        before,
        times_ns,
        full_disk=meet("start", 1, LIMIT_BYTES),
        interrupted=meet("step", 1, "SIGINT"),
        killed=meet("replace", KILLED_BEFORE_FILE[stage], "SIGKILL"),
        finished=driver.run("run", run_recipe, "--out", run),
    )


class TestEveryStage:
    def test_full_disk_is_one_line(self, history: History) -> None:
        assert history.full_disk.outcome.status == 1
        error = history.full_disk.outcome.error
        assert str(history.run) in error
        assert "then run the same command again." in error
        assert f"{history.stage:<10} ..." in history.full_disk.outcome.stderr

    def test_ctrl_c_is_one_line(self, history: History) -> None:
        assert history.interrupted.outcome.status == 130
        assert history.interrupted.outcome.error == (
            "treeq-export: interrupted. Run the same command again to go on from the last stage."
        )
        assert f"{history.stage:<10} ..." in history.interrupted.outcome.stderr

    def test_kill_ends_it_at_once(self, history: History) -> None:
        assert history.killed.outcome.status == -9
        assert history.killed.outcome.stderr.endswith(f"{history.stage:<10} ...\n")

    def test_nothing_is_half_written(self, history: History) -> None:
        for accident in (history.full_disk, history.interrupted, history.killed):
            assert accident.half_written == []

    def test_finished_stages_stay_recorded(self, history: History) -> None:
        for accident in (history.full_disk, history.interrupted, history.killed):
            assert accident.stages == history.before

    def test_second_run_repeats_no_finished_stage(self, history: History) -> None:
        assert history.finished.status == 0, history.finished.stderr
        for name in STAGE_NAMES:
            word = "up to date" if name in history.earlier else "..."
            assert f"{name:<10} {word}\n" in history.finished.stderr
        after = read_stages(history.run)
        assert {name: after[name] for name in history.earlier} == history.before
        assert {path: path.stat().st_mtime_ns for path in history.times_ns} == history.times_ns

    def test_second_run_gives_what_an_undisturbed_one_gives(
        self, history: History, finished_run: Path
    ) -> None:
        report = json.loads((history.run / "report.json").read_text())
        expected = json.loads((finished_run / "report.json").read_text())
        for section in ("model", "plan", "parity", "quality", "size"):
            assert report[section] == expected[section]
        assert list(report["stages"]) == list(expected["stages"])
        for file in (
            "plan.json",
            "plan.safetensors",
            "calibration.json",
            "finetuned.safetensors",
            "parity.json",
        ):
            assert (history.run / file).read_bytes() == (finished_run / file).read_bytes()

    def test_second_run_leaves_no_temporaries(self, history: History) -> None:
        assert find_temporaries(history.run) == []
        assert find_half_written(history.run) == []


def test_the_checker_finds_half_written_files(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    assert find_half_written(run) == []
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.name[0] != "."]
    for path in files:
        os.truncate(path, path.stat().st_size * 2 // 3)
    assert find_half_written(run) == [str(path.relative_to(run)) for path in files]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB where this process may mount one, else a plain folder."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    mounted = shutil.which("mount") is not None and (
        subprocess.run(mount, capture_output=True, check=False).returncode == 0
    )
    yield disk
    if mounted:
        subprocess.run(["umount", str(disk)], check=True)


def test_really_full_disk(
    driver: Any, run_recipe: Path, finished_run: Path, small_disk: Path
) -> None:
    # plan.safetensors is larger than the disk. Without a disk of its own the write fails by order.
    assert (finished_run / "plan.safetensors").stat().st_size > 64 * 1024
    trap = None
    if not small_disk.is_mount():
        trap = {"stage": "calibrate", "on": "replace", "count": 2, "action": "ENOSPC"}
    run = small_disk / "run"
    outcome = driver.run("run", run_recipe, "--out", run, trap=trap)
    assert outcome.status == 1
    assert outcome.error.startswith(f"treeq-export: {run}/plan.safetensors: the disk is full (")
    assert outcome.error.endswith("then run the same command again.")
    assert find_temporaries(run) == []
    assert find_half_written(run) == []
    assert list(read_stages(run)) == ["search"]


def test_full_disk_of_the_run_record(driver: Any, run_recipe: Path, small_disk: Path) -> None:
    if small_disk.is_mount():
        (small_disk / "ballast").write_bytes(b"0" * 64 * 1024)
        outcome = driver.run("run", run_recipe, "--out", small_disk / "run")
    else:
        trap = {"stage": "search", "on": "replace", "count": 1, "action": "ENOSPC"}
        outcome = driver.run("run", run_recipe, "--out", small_disk / "run", trap=trap)
    assert outcome.status == 1
    assert "the disk is full" in outcome.error
    assert find_half_written(small_disk / "run") == []


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3])
def test_killed_between_the_files_of_calibrate_on_its_second_run(
    driver: Any, run_recipe: Path, finished_run: Path, tmp_path: Path, count: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    trap = {"stage": "calibrate", "on": "replace", "count": count, "action": "SIGKILL"}
    command = ("run", run_recipe, "--out", run)
    killed = driver.run(*command, "--from", "calibrate", "--set", "seed=3", trap=trap)
    assert killed.status == -9
    assert read_stages(run) == read_stages(finished_run)
    assert find_half_written(run) == []
    finished = driver.run(*command)
    assert finished.status == 0, finished.stderr
    assert "search     up to date\n" in finished.stderr
    for file in ("plan.json", "plan.safetensors", "calibration.json", "parity.json"):
        assert (run / file).read_bytes() == (finished_run / file).read_bytes()
