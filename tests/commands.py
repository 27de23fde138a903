"""A complete run, and commands in processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests import meter
from tests.tiny_models import save_tiny
from treeq_export.cli import main
from treeq_export.records import BenchMemory

RUN_RECIPE = """\
name: tiny
model: {checkpoint: checkpoint}
sampler: {steps: 2, batch_size: 4}
search: {rotation_group: 32, branch: {b_in: 1, b_out: 1, rank: 4}}
calibrate: {num_samples: 2, num_clip_steps: 4}
finetune:
  {mode: peft, steps: 4, batch_size: 4, num_trajectories: 4, check_every: 2, held_out_rows: 4}
compile: {targets: [ort], max_batch: 8}
validate: {batch_size: 2}
bench: {batch_sizes: [1], rounds: 3, warmup: 1, threads: 1}
evaluate: {num_samples: 2, runner: ort}
"""
# The least that a comparison of this recipe can do.
LEAST_WORK = (
    "evaluate.num_samples=2",
    "sampler.steps=2",
    "calibrate.num_samples=2",
    "calibrate.num_rows=4",
    "finetune.steps=2",
    "finetune.check_every=1",
    "finetune.batch_size=2",
    "finetune.num_trajectories=2",
    "finetune.held_out_rows=2",
)


@pytest.fixture(scope="session")
def run_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a run that takes seconds, beside its checkpoint: one DiT block. Read-only."""
    folder = tmp_path_factory.mktemp("recipe")
    save_tiny("dit", folder / "checkpoint", num_layers=1)
    (folder / "recipe.yaml").write_text(RUN_RECIPE)
    return folder / "recipe.yaml"


def measure_nothing(target: str, *_: Any) -> BenchMemory:
    """Stand in for bench's `measure_memory`."""
    return BenchMemory(target=target, after_load_bytes=1, peak_bytes=1, file_bytes=1, load_s=0.1)


@pytest.fixture(scope="session")
def finished_run(run_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run of `run_recipe`. Read-only: copy it to change it.

    Bench's processes that measure memory are not started: each imports everything.
    """
    run = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("treeq_export.bench.stage.measure_memory", measure_nothing)
        result = CliRunner().invoke(main, ["run", str(run_recipe), "--out", str(run)])
    assert result.exit_code == 0, result.output
    return run


@dataclass(frozen=True)
class Outcome:
    """How a command ended; a negative status is a signal.

    Below the folder of a `Killer` it made so many changes, some of them with a gap.
    """

    status: int
    stdout: str
    stderr: str
    changes: int = 0
    gaps: int = 0

    @property
    def error(self) -> str:
        """The one line that an error has to be."""
        assert "Traceback" not in self.stderr, self.stderr
        lines = [line for line in self.stderr.splitlines() if line.startswith("treeq-export: ")]
        assert len(lines) == 1, self.stderr
        assert self.stderr.endswith(f"{lines[0]}\n")
        return lines[0]


class Driver:
    """Runs commands in processes of their own, see fork_driver.py."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_driver"],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def run(self, *args: object, trap: dict[str, Any] | None = None) -> Outcome:
        """Run `treeq-export ARGS`."""
        answer = self._order(args=[str(arg) for arg in args], trap=trap)
        meter.charge(answer.pop("cpu_s"))
        return Outcome(**answer)

    def close(self) -> None:
        """End the process."""
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()

    def _order(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="session")
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    """A function-like object: command line -> how the command ended, in a process of its own."""
    driver = Driver()  # imports while the run is made, whose exports its children find in the cache
    request.getfixturevalue("finished_run")
    yield driver
    driver.close()
