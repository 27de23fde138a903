"""Running the stage: student, held-out inputs, training, and the two files that it ends with.

The result is laid over `plan.safetensors` (plan.py) and holds only what was trained.
"""

import time
from pathlib import Path

import torch
from safetensors.numpy import save_file

from treeq_export import __version__
from treeq_export.artefacts import atomic_path, digest_of
from treeq_export.errors import OutputError, RecipeError, TreeqError
from treeq_export.finetune.pool import TrajectoryPool
from treeq_export.finetune.state import load_state, save_state
from treeq_export.finetune.student import Kind, export_student, make_student
from treeq_export.finetune.training import Training
from treeq_export.model.trajectories import collect_rows
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import Plan, Tensors, in_order, tensors_digest
from treeq_export.progress import OnStep, Say, say_nothing
from treeq_export.recipe import FinetuneSection, Recipe
from treeq_export.records import FinetunePoint, FinetuneRecord, save_record
from treeq_export.run_folder import RunFolder

# Far from the seeds that calibrate and evaluate draw their noise with.
_HELD_OUT_SEED = 1_000_003
_PREPARATION = 0.05  # share of the progress bar


def run_finetune(
    run: Path,
    denoiser: Denoiser,
    plan: Plan,
    tensors: Tensors,
    recipe: Recipe,
    on_step: OnStep,
    say: Say = say_nothing,
) -> FinetuneRecord | None:
    """Call `train` and write `finetuned.safetensors` and `finetune.json` into a run folder.

    A training that was interrupted in the folder goes on. Mode "none" only removes an earlier
    result, and returns None.

    Raises:
        TreeqError: The same as by `train`; nothing is written.
        OutputError: The folder cannot be written to.
    """
    state = run / RunFolder.FINETUNE_STATE
    if recipe.finetune.mode == "none":
        for name in (RunFolder.FINETUNE, RunFolder.FINETUNED, RunFolder.FINETUNE_STATE):
            (run / name).unlink(missing_ok=True)
        on_step(1.0)
        return None
    trained, record = train(denoiser, plan, tensors, recipe, on_step, state, say)
    (run / RunFolder.FINETUNE).unlink(missing_ok=True)
    with atomic_path(run / RunFolder.FINETUNED) as temporary:
        save_file(trained, temporary)
    save_record(run / RunFolder.FINETUNE, record)
    state.unlink(missing_ok=True)
    return record


def train(
    denoiser: Denoiser,
    plan: Plan,
    tensors: Tensors,
    recipe: Recipe,
    on_step: OnStep,
    state: Path | None = None,
    say: Say = say_nothing,
) -> tuple[Tensors, FinetuneRecord]:
    """Train what the recipe names.

    Args:
        denoiser: The full-precision model.
        plan: The calibrated plan.
        tensors: The plan's calibrated tensors, without an earlier result of this function.
        recipe: The recipe, of which the sections finetune and sampler and the seed are read.
        on_step: Called with the fraction done, 0..1.
        state: File that keeps the state of an interrupted training; None keeps none.
        say: Called with one line if that file is damaged.

    Returns:
        The trained tensors by name, in name order, and the record.

    Raises:
        RecipeError: The plan has nothing of what the recipe wants to train.
        PlanError: The plan does not fit the model.
        TreeqError: The loss is not finite; the state is removed.
        OutputError: The state cannot be written.
    """
    section = recipe.finetune
    started = time.monotonic()
    training = _prepare(denoiser, plan, tensors, recipe)
    fingerprint = _fingerprint(plan, recipe)
    before = 0.0 if state is None else load_state(state, training, fingerprint, say)
    if training.progress.step == 0:
        training.pool.spread(
            training.teacher, section.batch_size, lambda part: on_step(_PREPARATION * part)
        )

    def elapsed() -> float:
        return before + time.monotonic() - started

    def save() -> None:
        if state is not None:
            save_state(state, training, fingerprint, elapsed())

    try:
        stopped = training.run(lambda part: on_step(_PREPARATION + (1 - _PREPARATION) * part), save)
    except OutputError:
        raise
    except TreeqError:  # what the saved state leads to is not finite
        if state is not None:
            state.unlink(missing_ok=True)
        raise
    trained = in_order(export_student(training.student.denoiser))
    progress = training.progress
    best = next(p for p in progress.curve if p["step"] == progress.best_step)
    record = FinetuneRecord(
        mode=section.mode,
        base_tensors_sha256=plan.tensors_sha256 or "",
        tensors_sha256=tensors_digest(trained),
        num_trained=sum(p.numel() for p in training.parameters.values()),
        steps=progress.step,
        best_step=progress.best_step,
        mse_before=progress.curve[0]["held_out_mse"],
        mse_after=best["held_out_mse"],
        stopped_early=stopped,
        seconds=round(elapsed(), 3),
        curve=[FinetunePoint(**point) for point in progress.curve],
    )
    on_step(1.0)
    return trained, record


def _kinds(section: FinetuneSection) -> frozenset[Kind]:
    return frozenset[Kind]((*section.train, *(("codes",) if section.mode == "qat" else ())))


def _prepare(denoiser: Denoiser, plan: Plan, tensors: Tensors, recipe: Recipe) -> Training:
    """Return the training at its start, before the pool's states are spread over the schedule."""
    section, sampler = recipe.finetune, recipe.sampler
    student = make_student(denoiser, plan, tensors, _kinds(section))
    if not any(parameter.requires_grad for parameter in student.parameters()):
        wanted = ", ".join(section.train) or "nothing"
        raise RecipeError(
            f"finetune.train: received {wanted}, expected something that a layer of the plan has. "
            "Add weight_scale or bias, give the layers a branch, or set finetune.mode to none."
        )
    size = max(section.num_trajectories, section.batch_size)
    pool = TrajectoryPool(denoiser, sampler, size, section.on_policy, recipe.seed)
    # Twice as many as there are rows to keep, so that not only every step of a few is kept.
    held_out = collect_rows(
        denoiser,
        sampler,
        num_samples=-(-2 * section.held_out_rows // sampler.steps),
        num_rows=section.held_out_rows,
        seed=recipe.seed + _HELD_OUT_SEED,
    )
    return Training(denoiser, student, plan.block_names, pool, held_out, section)


def _fingerprint(plan: Plan, recipe: Recipe) -> str:
    """Return the digest of all that a training depends on."""
    return digest_of(
        version=__version__,
        tensors=plan.tensors_sha256,
        plan=plan.model_dump(mode="json"),
        seed=recipe.seed,
        sampler=recipe.sampler.model_dump(mode="json"),
        finetune=recipe.finetune.model_dump(mode="json"),
        threads=torch.get_num_threads(),
    )
