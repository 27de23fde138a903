"""The stages in order: what each depends on, what it writes, how it is run."""

import shlex
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from treeq_export import __version__
from treeq_export.bench.stage import run_bench
from treeq_export.calibrate import run_calibrate
from treeq_export.compile.stage import run_compile
from treeq_export.evaluate.stage import run_evaluate
from treeq_export.finetune.stage import run_finetune
from treeq_export.model.quantized import quantize_model
from treeq_export.pipeline.baseline import open_baseline
from treeq_export.pipeline.workspace import Workspace
from treeq_export.plan import FINETUNE_FILE, FINETUNED_FILE, PLAN_FILE, load_tensors
from treeq_export.recipe import Recipe
from treeq_export.report import Report, make_report, write_report
from treeq_export.runners.model_files import model_files, model_path
from treeq_export.runners.torch_runner import TorchRunner
from treeq_export.search.stage import RECORD_FILE as SEARCH_FILE
from treeq_export.search.stage import run_search
from treeq_export.targets.names import FP32
from treeq_export.targets.table import different_ways, open_way
from treeq_export.validate.stage import run_validate

OnStep = Callable[[float], None]
_BASELINE_SHARE = 0.1  # of evaluate's work, where the recipe asks for a baseline
# Opens a progress bar for a stage (name, whether it is skipped) and returns its callback.
OnStage = Callable[[str, bool], OnStep]


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline.

    Attributes:
        name: Also the command's name.
        sections: Recipe sections that its result depends on.
        after: Stages whose results it reads.
        outputs: Files that it has written, relative to the run folder.
        execute: Does the work.
        memory: Recipe keys that lower its memory where they are lowered, each with the number of
            samples that are in memory at once because of it; 0 where that is not plain.
    """

    name: str
    sections: tuple[str, ...]
    after: tuple[str, ...]
    outputs: Callable[[Workspace], list[str]]
    execute: Callable[[Workspace, OnStep], object]
    memory: Callable[[Recipe], dict[str, int]] = lambda _: {}


def _search(workspace: Workspace, on_step: OnStep) -> None:
    workspace.forget_plan()
    run_search(
        workspace.run,
        workspace.denoiser,
        workspace.checkpoint,
        workspace.recipe,
        on_step,
        workspace.say,
    )


def _calibrate(workspace: Workspace, on_step: OnStep) -> None:
    plan = workspace.plan
    workspace.forget_plan()
    run_calibrate(workspace.run, workspace.denoiser, plan, workspace.recipe, on_step)


def _finetune(workspace: Workspace, on_step: OnStep) -> object:
    plan = workspace.plan
    calibrated = load_tensors(workspace.run, plan, finetuned=False)
    record = run_finetune(
        workspace.run,
        workspace.denoiser,
        plan,
        calibrated,
        workspace.recipe,
        on_step,
        workspace.say,
    )
    workspace.forget_plan()
    return record


def _finetuned_files(workspace: Workspace) -> list[str]:
    return [name for name in (FINETUNE_FILE, FINETUNED_FILE) if (workspace.run / name).is_file()]


def _compile(workspace: Workspace, on_step: OnStep) -> None:
    run_compile(
        workspace.run,
        workspace.denoiser,
        workspace.plan,
        workspace.tensors,
        workspace.recipe.compile,
        on_step,
    )


def _validate(workspace: Workspace, on_step: OnStep) -> None:
    run_validate(
        workspace.run,
        workspace.denoiser,
        workspace.plan,
        workspace.tensors,
        workspace.recipe.compile.targets,
        workspace.recipe.validate_,
        workspace.recipe.seed,
        on_step,
    )


def _bench(workspace: Workspace, on_step: OnStep) -> None:
    recipe = workspace.recipe
    timed = [way.name for way in different_ways(recipe.compile.targets) if not way.emulated]
    run_bench(
        workspace.run,
        workspace.denoiser,
        recipe.bench,
        targets=["torch_fp32", "ort_fp32", "ort_int8", *timed],
        seed=recipe.seed,
        on_step=on_step,
        model=recipe.model,
        say=workspace.say,
    )


def _evaluate(workspace: Workspace, on_step: OnStep) -> None:
    recipe = workspace.recipe
    name = recipe.evaluate.runner
    with ExitStack() as stack:
        baseline, before = None, 0.0
        if recipe.evaluate.baseline is not None:
            before = _BASELINE_SHARE
            made = open_baseline(workspace, lambda done: on_step(_BASELINE_SHARE * done))
            baseline = stack.enter_context(made)
        if name == "torch":
            quantized = quantize_model(workspace.denoiser, workspace.plan, workspace.tensors)
            runner = stack.enter_context(TorchRunner(quantized))
        else:
            runner = stack.enter_context(open_way(workspace.run, name))
        run_evaluate(
            workspace.run,
            workspace.denoiser,
            runner,
            recipe,
            on_step=lambda done: on_step(before + (1 - before) * done),
            baseline=baseline,
            fp_samples=workspace.fp_samples,
            say=workspace.say,
        )


def _report(workspace: Workspace, on_step: OnStep) -> Report:
    report = read_report(workspace)
    write_report(report)
    on_step(1.0)
    return report


def read_report(workspace: Workspace) -> Report:
    """Return the report of a run without writing it.

    Raises:
        PlanError: The plan or compile.json is missing, or a record is malformed.
    """
    seconds = {name: record.seconds for name, record in workspace.stages.items()}
    return make_report(
        workspace.run,
        stages={stage.name: seconds[stage.name] for stage in STAGES if stage.name in seconds},
        recipe=workspace.recipe,
        commands=reproduce_commands(workspace),
    )


def _compiled_files(workspace: Workspace) -> list[str]:
    run = workspace.run
    targets = (FP32, *workspace.recipe.compile.targets)
    files = [file for target in targets for file in model_files(model_path(run, target))]
    return ["compile.json", *(str(file.relative_to(run)) for file in files)]


def _search_memory(recipe: Recipe) -> dict[str, int]:
    section = recipe.search
    if section.strategy == "uniform" and section.branch_budget is None:
        return {}
    return {
        "search.num_samples": section.num_samples * recipe.sampler.steps,
        "search.num_rows": 0,
        "search.num_final_rows": 0,
        **_calibrate_memory(recipe),
    }


def _calibrate_memory(recipe: Recipe) -> dict[str, int]:
    return {
        "calibrate.num_samples": recipe.calibrate.num_samples,
        "calibrate.num_rows": 0,
        "calibrate.max_tokens": 0,
        "sampler.batch_size": 0,
    }


def _finetune_memory(recipe: Recipe) -> dict[str, int]:
    section = recipe.finetune
    if section.mode == "none":
        return {}
    return {
        "finetune.batch_size": 0,
        "finetune.num_trajectories": section.num_trajectories,
        "finetune.held_out_rows": section.held_out_rows,
        "sampler.batch_size": 0,
    }


def _evaluate_memory(recipe: Recipe) -> dict[str, int]:
    return {"evaluate.num_samples": recipe.evaluate.num_samples, "sampler.batch_size": 0}


STAGES = (
    Stage(
        "search",
        ("name", "model", "search"),
        (),
        lambda _: [PLAN_FILE, SEARCH_FILE],
        _search,
        _search_memory,
    ),
    Stage(
        "calibrate",
        ("model", "sampler", "calibrate", "seed"),
        ("search",),
        lambda _: [PLAN_FILE, "plan.safetensors", "calibration.json"],
        _calibrate,
        _calibrate_memory,
    ),
    Stage(
        "finetune",
        ("model", "sampler", "finetune", "seed"),
        ("calibrate",),
        _finetuned_files,
        _finetune,
        _finetune_memory,
    ),
    Stage("compile", ("model", "compile"), ("finetune",), _compiled_files, _compile),
    Stage(
        "validate",
        ("validate", "seed"),
        ("compile",),
        lambda _: ["parity.json"],
        _validate,
        lambda recipe: {"validate.batch_size": recipe.validate_.batch_size},
    ),
    Stage(
        "bench",
        ("bench", "seed"),
        ("compile",),
        lambda _: ["bench.json"],
        _bench,
        lambda recipe: {"bench.batch_sizes": max(recipe.bench.batch_sizes)},
    ),
    Stage(
        "evaluate",
        ("sampler", "evaluate", "seed"),
        ("compile",),
        lambda _: ["quality.json"],
        _evaluate,
        _evaluate_memory,
    ),
    Stage(
        "report",
        (),
        ("validate", "bench", "evaluate"),
        lambda _: ["report.json", "report.html"],
        _report,
    ),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)


def reproduce_commands(workspace: Workspace) -> list[str]:
    """Return the command lines that repeat a run."""
    recipe = workspace.recipe_path or "RECIPE"
    words = ["treeq-export", "run", recipe, "--out", workspace.run.absolute().name]
    for override in workspace.overrides:
        words += ["--set", override]
    return [f"pip install treeq-export=={__version__}", shlex.join(words)]
