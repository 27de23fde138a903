"""All stages in order, each skipped while what it depends on has not changed.

A stage is up to date when its fingerprint (its recipe sections, the checkpoint, the fingerprint of
the stages before it, the version of treeq-export) and the digests of its output files are those of
`run.json`. Before a stage runs, its results and those of the stages that read them are removed, so
that no reader meets results of two different plans. Interrupting loses the stage that is at work,
never a finished one.

plan.json is written by search, completed by calibrate, and open to the user's edits: search is up
to date while the file is JSON, calibrate while it is as calibrate left it. An edited plan is hence
calibrated and compiled again, but not searched again.
"""

import hashlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treeq_export import __version__
from treeq_export.artefacts import sha256_of_file
from treeq_export.environment import available_memory
from treeq_export.errors import OutOfMemoryError, PlanError, RecipeError
from treeq_export.memory import explain_memory
from treeq_export.pipeline.stages import STAGE_NAMES, STAGES, OnStage, OnStep, Stage
from treeq_export.pipeline.workspace import StageRecord, Workspace
from treeq_export.plan import PLAN_FILE
from treeq_export.reading import read_object
from treeq_export.recipe import Recipe, strategy_options
from treeq_export.report import Report


def stage_named(name: str) -> Stage:
    """Return the stage of that name."""
    return next(stage for stage in STAGES if stage.name == name)


def stages_before(recipe: Recipe, stage: Stage) -> tuple[str, ...]:
    """Return the names of the stages whose results a stage reads.

    Evaluate with runner "torch" needs no compiled graph: it reads what compile reads.
    """
    if stage.name == "evaluate" and recipe.evaluate.runner == "torch":
        return stage_named("compile").after
    return stage.after


def sections_of(recipe: Recipe, stage: Stage) -> tuple[str, ...]:
    """Return the recipe sections that a stage's result depends on.

    A search that measures does so on trajectories, with weights quantized as calibrate does.
    """
    uniform = recipe.search.strategy == "uniform" and recipe.search.branch_budget is None
    if stage.name == "search" and not uniform:
        return (*stage.sections, "sampler", "calibrate", "seed")
    return stage.sections


def fingerprint(workspace: Workspace, stage: Stage) -> str:
    """Return the digest of everything that a stage's result depends on.

    Files count by their content, wherever they lie.
    """
    recipe = recipe_with_digests(workspace)
    before = stages_before(workspace.recipe, stage)
    depends = {
        "version": __version__,
        "stage": stage.name,
        "sections": {name: recipe[name] for name in sections_of(workspace.recipe, stage)},
        "after": [fingerprint(workspace, stage_named(name)) for name in before],
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def recipe_with_digests(workspace: Workspace) -> dict[str, Any]:
    """Return the recipe with the digest of each file in the place of its path."""
    recipe = workspace.recipe.model_dump(mode="json", by_alias=True)
    recipe["model"]["checkpoint"] = workspace.checkpoint.sha256
    for key, file in _recipe_files(workspace.recipe).items():
        section, _, field = key.partition(".")
        recipe[section][field] = workspace.sha256(file) if file.is_file() else None
    return recipe


def _recipe_files(recipe: Recipe) -> dict[str, Path]:
    """Return the files that a recipe names beside the checkpoint, by their key."""
    files = {
        "model.conditioning": recipe.model.conditioning,
        "evaluate.classifier": recipe.evaluate.classifier,
        "evaluate.reference": recipe.evaluate.reference,
    }
    return {key: Path(file) for key, file in files.items() if file is not None}


def is_up_to_date(workspace: Workspace, stage: Stage) -> bool:
    """Whether a stage's result is there and nothing that it depends on has changed."""
    return stage.name in workspace.stages and _find_change(workspace, stage) is None


def _find_change(workspace: Workspace, stage: Stage, *, files: bool = True) -> str | None:
    """Return what has changed since a stage ran, beginning with the file; None if nothing has.

    Without `files` only what the stage depends on is looked at.
    """
    record, run = workspace.stages[stage.name], workspace.run
    if record.fingerprint != fingerprint(workspace, stage):
        return f"{run}: made with another recipe, checkpoint or version of treeq-export"
    if files and stage.name == "search" and not _is_plan_of(workspace):
        return f"{run / PLAN_FILE}: not the plan of this recipe"
    for name, digest in record.outputs.items() if files else ():
        if (stage.name, name) == ("search", PLAN_FILE):
            continue
        if not (run / name).is_file():
            return f"{run / name}: missing"
        if workspace.sha256(run / name) != digest:
            return f"{run / name}: not the file that {stage.name} wrote"
    return None


def _is_plan_of(workspace: Workspace) -> bool:
    """Whether plan.json was searched with this recipe.

    Its bytes say nothing: calibrate completes it, and a user may have edited its layers. But a
    search that was killed may have left the plan of another recipe. (That of another checkpoint
    is refused when it is loaded.)
    """
    try:
        plan = read_object(workspace.run / PLAN_FILE, error=PlanError, remedy="Search again.")
        options = plan["strategy"]["options"]
    except (PlanError, KeyError, TypeError):
        return False
    return options == strategy_options(workspace.recipe.search)


def run_stage(workspace: Workspace, stage: Stage, on_step: OnStep) -> object:
    """Run one stage and record it.

    Args:
        workspace: The run.
        stage: The stage; what it reads has to be there.
        on_step: Called with the fraction done, 0..1.

    Returns:
        The stage's result, if any.

    Raises:
        OutOfMemoryError: Memory ran out; names the recipe's keys to lower.
        TreeqError: Whatever else the stage raises.
    """
    started = time.monotonic()
    check_memory(workspace, stage)
    with explain_memory(stage.name, memory_keys(workspace.recipe, stage)):
        result = stage.execute(workspace, on_step)
    _remove_dependent_results(workspace, stage)
    workspace.stages[stage.name] = StageRecord(
        fingerprint=fingerprint(workspace, stage),
        seconds=round(time.monotonic() - started, 3),
        outputs={name: sha256_of_file(workspace.run / name) for name in stage.outputs(workspace)},
    )
    workspace.save()
    return result


def memory_keys(recipe: Recipe, stage: Stage) -> list[str]:
    """Return the recipe's keys that lower a stage's memory where they are lowered."""
    return [*stage.memory(recipe), *_latent_keys(recipe)]


def _latent_keys(recipe: Recipe) -> list[str]:
    return [] if recipe.model.latent_size is None else ["model.latent_size"]


def check_memory(workspace: Workspace, stage: Stage) -> None:
    """Check that the samples alone that a stage keeps at once can be in memory.

    Raises:
        OutOfMemoryError: They cannot; names the keys.
    """
    keys = memory_keys(workspace.recipe, stage)
    with explain_memory(stage.name, keys):
        shape = workspace.denoiser.sample_shape
    size_text, most = " x ".join(map(str, shape)), available_memory()
    for key, num in stage.memory(workspace.recipe).items():
        size = num * 4 * math.prod(shape)
        if size > most:
            lower = " or ".join([key, *_latent_keys(workspace.recipe)])
            raise OutOfMemoryError(
                f"{stage.name}: out of memory: {key} asks for {num:,} samples of {size_text} "
                f"numbers at once, {size / 1e9:,.1f} GB; there are {most / 1e9:,.1f} GB. "
                f"Lower {lower}."
            )


def _remove_dependent_results(workspace: Workspace, stage: Stage) -> None:
    """Remove what later stages made of a stage's former result.

    Only a stage that has succeeded does this: one that fails on bad input loses nothing. The plan
    stays, since calibrate reads the file that it writes.
    """
    gone = _dependents(workspace.recipe, stage) - {stage.name}
    kept = {PLAN_FILE, *stage.outputs(workspace)}
    for later in STAGES:
        for file in later.outputs(workspace) if later.name in gone else ():
            if file not in kept:
                (workspace.run / file).unlink(missing_ok=True)
    workspace.stages = {
        name: record
        for name, record in workspace.stages.items()
        if name in STAGE_NAMES and name not in gone
    }


def _dependents(recipe: Recipe, stage: Stage) -> set[str]:
    """Return the names of a stage and of all stages that read its results."""
    found = {stage.name}
    for later in STAGES:
        if found & set(stages_before(recipe, later)):
            found.add(later.name)
    return found


def run_all(workspace: Workspace, start: str | None, on_stage: OnStage) -> Report:
    """Run every stage that is not up to date, and the report.

    Args:
        workspace: The run.
        start: Stage from which everything is run again; None reruns only what changed.
        on_stage: Called at the start of every stage.

    Returns:
        The report. Gates that are not met are in it: see `check_gates`.

    Raises:
        RecipeError: A file that a later stage needs is missing, or its runner is not compiled.
        TreeqError: A stage failed; finished stages are kept.
    """
    check_recipe(workspace.recipe)
    again = begun = False
    report: object = None
    for stage in STAGES:
        again = again or stage.name == start
        current = stage.name != "report" and not again and is_up_to_date(workspace, stage)
        if not current and not begun:
            for later in STAGES[STAGES.index(stage) :]:
                check_memory(workspace, later)
            begun = True
        on_step = on_stage(stage.name, current)
        if not current:
            report = run_stage(workspace, stage, on_step)
    assert isinstance(report, Report)
    return report


def check_recipe(recipe: Recipe) -> None:
    """Check, before the first stage, what the last ones will need.

    Raises:
        RecipeError: A file is missing, or the runner of evaluate is not compiled.
    """
    for key, file in _recipe_files(recipe).items():
        if not file.is_file():
            raise RecipeError(f"{file}: no such file. Correct {key} in the recipe, or remove it.")
    runner, targets = recipe.evaluate.runner, recipe.compile.targets
    if runner not in ("torch", *targets):
        raise RecipeError(
            f"evaluate.runner: received {runner}, expected torch or one of compile.targets "
            f"({', '.join(targets)}). Set it to one of these, or add {runner} to compile.targets."
        )


def require_stages(workspace: Workspace, stage: Stage) -> None:
    """Check that all stages that one reads, directly or not, are up to date.

    The report is made of whatever has been measured, but not of results of another recipe.

    Raises:
        PlanError: Names the first file that has changed, and the first stage to run.
    """
    for earlier in STAGES[: STAGES.index(stage)]:
        if stage.name in _dependents(workspace.recipe, earlier):
            _require(workspace, stage.name, earlier)


def require_result(workspace: Workspace, reader: str, name: str) -> Mapping[str, str]:
    """Check that a stage and all that it reads are up to date.

    Args:
        workspace: The run.
        reader: Who reads the result, for the message.
        name: The stage.

    Returns:
        SHA-256 of the stage's files, relative to the run folder.

    Raises:
        PlanError: Names the first file that has changed, and the first stage to run.
    """
    stage = stage_named(name)
    for earlier in STAGES[: STAGES.index(stage) + 1]:
        if stage.name in _dependents(workspace.recipe, earlier):
            _require(workspace, reader, earlier)
    return workspace.stages[name].outputs if name in workspace.stages else {}


def _require(workspace: Workspace, reader: str, stage: Stage) -> None:
    """Check that one stage is up to date; the report only wants results of its recipe.

    Raises:
        PlanError: It is not.
    """
    if stage.name in workspace.stages:
        why, change = "is out of date", _find_change(workspace, stage, files=reader != "report")
        if change is None:
            return
    else:
        if reader == "report" or _has_nothing_to_do(workspace, stage):
            return
        why, change = "is not there yet", str(workspace.run)
    raise PlanError(
        f"{change}: {reader} needs the result of {stage.name}, which {why}. "
        f"Run `treeq-export {stage.name} --run {workspace.run}` first."
    )


def _has_nothing_to_do(workspace: Workspace, stage: Stage) -> bool:
    """Whether a stage that has not run would write nothing and has nothing to remove."""
    nothing = workspace.recipe.finetune.mode == "none" and not stage.outputs(workspace)
    return stage.name == "finetune" and nothing
