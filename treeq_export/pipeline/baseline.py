"""What the same budget gives without search and without finetune, beside a run.

DIR/baseline holds a plan of its own, searched by strategy "uniform" and calibrated as the run is.
It is made when evaluate asks for it, and made again when something that it depends on has changed.
"""

import hashlib
import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from treeq_export import __version__
from treeq_export.artefacts import sha256_of_file
from treeq_export.calibrate import run_calibrate
from treeq_export.evaluate.samples import digest_quantized
from treeq_export.evaluate.stage import Baseline
from treeq_export.model.quantized import quantize_model
from treeq_export.pipeline.workspace import Workspace
from treeq_export.plan import PLAN_FILE, TENSORS_FILE, Plan, Tensors, load_plan, load_tensors
from treeq_export.recipe import Recipe
from treeq_export.runners.torch_runner import TorchRunner
from treeq_export.sealed import read_sealed_json, write_sealed_json
from treeq_export.search.stage import run_search

BASELINE_FOLDER = "baseline"
_KEY_FILE = "made_of.json"


def uniform_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with strategy "uniform": same budget, exclusions and fixed branch."""
    search = recipe.search.model_copy(update={"strategy": "uniform", "branch_budget": None})
    return recipe.model_copy(update={"search": search})


@contextmanager
def open_baseline(workspace: Workspace, on_step: Callable[[float], None]) -> Generator[Baseline]:
    """Make the baseline of a run where it is not there yet, and enter its runner.

    Args:
        workspace: The run.
        on_step: Called with the fraction done of making it, 0..1.

    Yields:
        The baseline, for `run_evaluate`.

    Raises:
        TreeqError: Whatever search and calibrate raise.
    """
    folder = workspace.run / BASELINE_FOLDER
    plan, tensors = _load(workspace, folder) or _make(workspace, folder, on_step)
    on_step(1.0)
    with TorchRunner(quantize_model(workspace.denoiser, plan, tensors)) as runner:
        yield Baseline(plan, runner, digest_quantized(folder, "torch"))


def _make(
    workspace: Workspace, folder: Path, on_step: Callable[[float], None]
) -> tuple[Plan, Tensors]:
    recipe = uniform_recipe(workspace.recipe)
    (folder / _KEY_FILE).unlink(missing_ok=True)
    plan = run_search(folder, workspace.denoiser, workspace.checkpoint, recipe, lambda _: None)
    plan = run_calibrate(folder, workspace.denoiser, plan, recipe, on_step)
    tensors = load_tensors(folder, plan)
    write_sealed_json(
        folder / _KEY_FILE, {"depends": _digest(workspace), "files": _digests(folder)}
    )
    return plan, tensors


def _load(workspace: Workspace, folder: Path) -> tuple[Plan, Tensors] | None:
    """Return what an earlier call has made for the same recipe and checkpoint."""
    made = read_sealed_json(folder / _KEY_FILE, workspace.say) or {}
    if made.get("depends") != _digest(workspace):
        return None
    if made["files"] != _digests(folder):
        workspace.say(f"{folder}: damaged; it is made again.")
        return None
    plan = load_plan(folder, workspace.checkpoint.sha256)
    return plan, load_tensors(folder, plan)


def _digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the plan and its tensors by name, as far as they are there."""
    files = [folder / PLAN_FILE, folder / TENSORS_FILE]
    return {file.name: sha256_of_file(file) for file in files if file.is_file()}


def _digest(workspace: Workspace) -> str:
    """Return the digest of everything that the baseline depends on."""
    values = uniform_recipe(workspace.recipe).model_dump(mode="json")
    parts = [values[name] for name in ("model", "sampler", "search", "calibrate", "seed")]
    depends = [__version__, workspace.checkpoint.sha256, *parts]
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
