"""The shipped sample, and runs of it that are compiled without a search."""

from collections.abc import Callable
from pathlib import Path

import pytest

from treeq_export.pipeline.run import run_stage, stage_named
from treeq_export.pipeline.workspace import Workspace
from treeq_export.recipe import Recipe


@pytest.fixture(scope="session")
def digits_folder() -> Path:
    """The shipped sample: checkpoint/, classifier.onnx, reference.safetensors."""
    return Path(__file__).parents[1] / "samples" / "digits"


@pytest.fixture(scope="session")
def digits_checkpoint(digits_folder: Path) -> Path:
    """The folder of the trained digits checkpoint."""
    return digits_folder / "checkpoint"


@pytest.fixture(scope="session")
def make_digits_run(
    digits_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A function: targets -> the digits sample, W4A4 with branches, compiled for them."""

    def make(*targets: str) -> Path:
        run = tmp_path_factory.mktemp("digits") / "run"
        recipe = Recipe.model_validate(
            {
                "name": "digits",
                "model": {"checkpoint": str(digits_checkpoint)},
                "sampler": {"scheduler": "flow_match_euler", "steps": 2, "batch_size": 2},
                "search": {"rotation_group": 128, "branch": {"b_in": 2, "b_out": 2, "rank": 4}},
                "calibrate": {"num_samples": 2, "num_clip_steps": 4, "rounding": "nearest"},
                "compile": {"targets": list(targets), "max_batch": 8},
            }
        )
        with Workspace(run, recipe) as workspace:
            for name in ("search", "calibrate", "finetune", "compile"):
                run_stage(workspace, stage_named(name), lambda _: None)
        return run

    return make
