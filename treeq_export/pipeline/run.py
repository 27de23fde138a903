"""Running the stages of `stages.py`, each skipped while what it depends on has not changed.

A stage is up to date when its fingerprint (its recipe sections, the checkpoint, the fingerprint of
the stages before it, the version of treeq-export) and the digests of its output files are those of
`run.json`. Before a stage runs, its results and those of the stages that read them are removed, so
that no reader meets results of two different plans. Interrupting loses the stage that is at work,
never a finished one.

plan.json is written by search, completed by calibrate, and open to the user's edits: search is up
to date while the file is JSON, calibrate while it is as calibrate left it. An edited plan is hence
calibrated and compiled again, but not searched again.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from treeq_export import __version__
from treeq_export.artefacts import digest_of, sha256_of_file
from treeq_export.environment import available_memory
from treeq_export.errors import OutOfMemoryError, PlanError, RecipeError
from treeq_export.memory import explain_memory
from treeq_export.pipeline.stages import STAGES, Stage
from treeq_export.pipeline.workspace import StageRecord, Workspace
from treeq_export.progress import OnStep
from treeq_export.recipe import Recipe
from treeq_export.report import Report
from treeq_export.run_folder import RunFolder

# Opens a stage's progress bar (name, whether it is skipped) and returns its callback.
OnStage = Callable[[str, bool], OnStep]
_SIBLING_SHARE = 0.1  # of a stage's work, where it needs a run beside it


def stage_named(name: str) -> Stage:
    """Return the stage of that name."""
    return {stage.name: stage for stage in STAGES}[name]


def fingerprint(workspace: Workspace, stage: Stage) -> str:
    """Return the digest of everything that a stage's result depends on.

    Files count by their content, wherever they lie.
    """
    values = recipe_with_digests(workspace)
    return digest_of(
        version=__version__,
        stage=stage.name,
        sections={name: values[name] for name in stage.sections(workspace.recipe)},
        after=[fingerprint(workspace, stage_named(n)) for n in stage.after(workspace.recipe)],
    )


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
    """Whether a stage's result exists and nothing that it depends on has changed."""
    return stage.name in workspace.stages and _find_change(workspace, stage) is None


def _find_change(workspace: Workspace, stage: Stage, *, files: bool = True) -> str | None:
    """Return what has changed since a stage ran, beginning with the file; None if nothing has.

    Without `files` only what the stage depends on is looked at.
    """
    record, run = workspace.stages[stage.name], workspace.run
    if record.fingerprint != fingerprint(workspace, stage):
        return f"{run}: made with another recipe, checkpoint or version of treeq-export"
    for name, digest in record.outputs.items() if files else ():
        if name in stage.edited:
            if not stage.edited[name](workspace):
                return f"{run / name}: not the plan of this recipe"
        elif not (run / name).is_file():
            return f"{run / name}: missing"
        elif workspace.sha256(run / name) != digest:
            return f"{run / name}: not the file that {stage.name} wrote"
    return None


def run_stage(workspace: Workspace, stage: Stage, on_step: OnStep) -> object:
    """Run one stage and record it.

    Args:
        workspace: The run.
        stage: The stage; what it reads has to exist.
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
        on_step = run_sibling(workspace, stage, on_step)
        workspace.forget(stage.outputs(workspace))
        try:
            result = stage.execute(workspace, on_step)
        finally:
            workspace.forget(stage.outputs(workspace))
    _remove_dependent_results(workspace, stage)
    workspace.stages[stage.name] = StageRecord(
        fingerprint=fingerprint(workspace, stage),
        seconds=round(time.monotonic() - started, 3),
        outputs={name: sha256_of_file(workspace.run / name) for name in stage.outputs(workspace)},
    )
    workspace.save()
    return result


def run_stages(
    workspace: Workspace, stages: Sequence[Stage], on_stage: OnStage, start: Stage | None = None
) -> dict[str, object]:
    """Run the stages that are not up to date.

    Args:
        workspace: The run.
        stages: The stages, in their order.
        on_stage: Called at the start of every stage.
        start: Stage from which everything is run again; None reruns only what changed.

    Returns:
        The results of the stages that ran, by name.

    Raises:
        TreeqError: A stage failed; finished stages are kept.
    """
    again, results = False, dict[str, object]()
    for place, stage in enumerate(stages):
        again = again or stage is start
        current = not (again or stage.always) and is_up_to_date(workspace, stage)
        if not (current or results):
            for later in stages[place:]:
                check_memory(workspace, later)
        on_step = on_stage(stage.name, current)
        if not current:
            results[stage.name] = run_stage(workspace, stage, on_step)
    return results


def run_sibling(workspace: Workspace, stage: Stage, on_step: OnStep) -> OnStep:
    """Bring the run that a stage reads beside its own up to date.

    Args:
        workspace: The run.
        stage: The stage.
        on_step: Called with the fraction done of the stage, the sibling's part included.

    Returns:
        The callback for the rest of the stage.
    """
    sibling = stage.sibling(workspace.recipe)
    if sibling is None:
        return on_step
    stages = [stage_named(name) for name in sibling.stages]
    part = _SIBLING_SHARE / len(stages)

    def on_stage(name: str, _skipped: bool) -> OnStep:
        start = part * sibling.stages.index(name)
        return lambda done: on_step(start + part * done)

    with workspace.sibling(workspace.run / sibling.folder, sibling.recipe) as other:
        run_stages(other, stages, on_stage)
    return lambda done: on_step(_SIBLING_SHARE + (1 - _SIBLING_SHARE) * done)


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
    with explain_memory(stage.name, memory_keys(workspace.recipe, stage)):
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
    recipe = workspace.recipe
    gone = {each.name for each in STAGES if stage.name in _upstream(recipe, each.after(recipe))}
    kept = {RunFolder.PLAN, *stage.outputs(workspace)}
    for later in STAGES:
        for file in later.outputs(workspace) if later.name in gone else ():
            if file not in kept:
                (workspace.run / file).unlink(missing_ok=True)
    names = [each.name for each in STAGES if each.name not in gone]
    workspace.stages = {name: r for name, r in workspace.stages.items() if name in names}


def _upstream(recipe: Recipe, names: Iterable[str]) -> set[str]:
    """Return the names of stages and of all stages whose results these read."""
    found = set(names)
    for stage in reversed(STAGES):
        if stage.name in found:
            found.update(stage.after(recipe))
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
    first = None if start is None else stage_named(start)
    report = run_stages(workspace, STAGES, on_stage, first).get(STAGES[-1].name)
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
    names = stage.after(workspace.recipe)
    require_results(workspace, stage.name, names, lenient=stage.always)


def require_results(
    workspace: Workspace, reader: str, names: Iterable[str], *, lenient: bool = False
) -> None:
    """Check that stages and all that they read are up to date.

    Args:
        workspace: The run.
        reader: Who reads the results, for the message.
        names: The stages.
        lenient: Whether the reader takes what exists, and asks only that it is of this recipe.

    Raises:
        PlanError: Names the first file that has changed, and the first stage to run.
    """
    needed = _upstream(workspace.recipe, names)
    for stage in STAGES:
        if stage.name not in needed:
            continue
        if stage.name in workspace.stages:
            why, change = "is out of date", _find_change(workspace, stage, files=not lenient)
        elif lenient or (stage.idle(workspace.recipe) and not stage.outputs(workspace)):
            continue  # it would write nothing, and has nothing to remove
        else:
            why, change = "is not there yet", str(workspace.run)
        if change is not None:
            raise PlanError(
                f"{change}: {reader} needs the result of {stage.name}, which {why}. "
                f"Run `treeq-export {stage.name} --run {workspace.run}` first."
            )
