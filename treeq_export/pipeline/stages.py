"""The stages in order: what each depends on, what it writes, how it is run.

A stage is one row of `STAGES`, which nothing else lists: commands, progress, skipping and the
report's times are made of the rows. What does the work is imported when it is run.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from treeq_export.progress import OnStep
from treeq_export.run_folder import RunFolder

if TYPE_CHECKING:
    from treeq_export.evaluate.stage import Baseline
    from treeq_export.pipeline.workspace import Workspace
    from treeq_export.recipe import Recipe
    from treeq_export.report import Report


@dataclass(frozen=True)
class Sibling:
    """A run of its own that a stage reads beside the results of its run.

    Attributes:
        folder: Name of its folder in the run folder.
        recipe: Recipe of the sibling, with the same model section.
        stages: Names of its stages, all of which have to be up to date.
    """

    folder: str
    recipe: "Recipe"
    stages: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline.

    Attributes:
        name: The name, which is that of the command too.
        execute: Does the work on a run; its second argument is called with the fraction done, 0..1.
        sections: Returns the recipe sections that the result depends on.
        after: Returns the names of the stages whose results it reads.
        outputs: Returns the files that it has written, relative to the run folder.
        record: The one of them that its command prints.
        summary: Help text of its command; None where the command has options of its own.
        always: Whether it runs every time, on whatever results exist.
        idle: Returns why it has nothing to do, as a sentence; None where it has something to do.
        memory: Returns the recipe keys that lower its memory where they are lowered, each with the
            number of samples that are in memory at once because of it; 0 where that is not plain.
        sibling: Returns the run that has to exist before it starts, if any.
        edited: Files among the outputs that later stages and users change, each with a function
            that says whether it is still the result of this recipe.
    """

    name: str
    execute: Callable[["Workspace", OnStep], object]
    sections: Callable[["Recipe"], tuple[str, ...]]
    after: Callable[["Recipe"], tuple[str, ...]]
    outputs: Callable[["Workspace"], list[str]]
    record: str
    summary: str | None = None
    always: bool = False
    idle: Callable[["Recipe"], str | None] = lambda _: None
    memory: Callable[["Recipe"], dict[str, int]] = lambda _: {}
    sibling: Callable[["Recipe"], Sibling | None] = lambda _: None
    edited: Mapping[str, Callable[["Workspace"], bool]] = field(
        default_factory=dict[str, Callable[["Workspace"], bool]]
    )


def _search(workspace: "Workspace", on_step: OnStep) -> None:
    from treeq_export.search.stage import run_search

    denoiser, checkpoint = workspace.denoiser, workspace.checkpoint
    run_search(workspace.run, denoiser, checkpoint, workspace.recipe, on_step, workspace.say)


def _search_sections(recipe: "Recipe") -> tuple[str, ...]:
    from treeq_export.search.strategies import needs_inputs

    # A measuring search quantizes weights as calibrate does.
    measuring = ("sampler", "calibrate", "seed") if needs_inputs(recipe.search) else ()
    return ("name", "model", "search", *measuring)


def _search_memory(recipe: "Recipe") -> dict[str, int]:
    from treeq_export.search.strategies import needs_inputs

    if not needs_inputs(recipe.search):
        return {}
    return {
        "search.num_samples": recipe.search.num_samples * recipe.sampler.steps,
        "search.num_rows": 0,
        "search.num_final_rows": 0,
        **_calibrate_memory(recipe),
    }


def _is_plan_of_recipe(workspace: "Workspace") -> bool:
    """Whether plan.json was searched with the recipe of the run.

    Its bytes say nothing: calibrate completes it, and a user may have edited its layers. But a
    search that was killed may have left the plan of another recipe. (That of another checkpoint
    is refused when it is loaded.)
    """
    from treeq_export.errors import PlanError
    from treeq_export.reading import read_object
    from treeq_export.recipe import strategy_options

    path = workspace.run / RunFolder.PLAN
    try:
        plan = read_object(path, error=PlanError, remedy="Search again.")
        return plan["strategy"]["options"] == strategy_options(workspace.recipe.search)
    except (PlanError, KeyError, TypeError):
        return False


def _calibrate(workspace: "Workspace", on_step: OnStep) -> None:
    from treeq_export.calibrate import run_calibrate

    run_calibrate(workspace.run, workspace.denoiser, workspace.plan, workspace.recipe, on_step)


def _calibrate_memory(recipe: "Recipe") -> dict[str, int]:
    return {
        "calibrate.num_samples": recipe.calibrate.num_samples,
        "calibrate.num_rows": 0,
        "calibrate.max_tokens": 0,
        "sampler.batch_size": 0,
    }


def _finetune(workspace: "Workspace", on_step: OnStep) -> object:
    from treeq_export.finetune.stage import run_finetune
    from treeq_export.plan import load_tensors

    run, denoiser, plan = workspace.run, workspace.denoiser, workspace.plan
    calibrated = load_tensors(run, plan, finetuned=False)
    recipe = workspace.recipe
    return run_finetune(run, denoiser, plan, calibrated, recipe, on_step, workspace.say)


def _finetuned_files(workspace: "Workspace") -> list[str]:
    files = (RunFolder.FINETUNE, RunFolder.FINETUNED)
    return [name for name in files if (workspace.run / name).is_file()]


def _finetune_memory(recipe: "Recipe") -> dict[str, int]:
    section = recipe.finetune
    if section.mode == "none":
        return {}
    return {
        "finetune.batch_size": 0,
        "finetune.num_trajectories": section.num_trajectories,
        "finetune.held_out_rows": section.held_out_rows,
        "sampler.batch_size": 0,
    }


def _compile(workspace: "Workspace", on_step: OnStep) -> None:
    from treeq_export.compile.stage import run_compile

    run, denoiser, plan = workspace.run, workspace.denoiser, workspace.plan
    run_compile(run, denoiser, plan, workspace.tensors, workspace.recipe.compile, on_step)


def _compiled_files(workspace: "Workspace") -> list[str]:
    from treeq_export.runners.model_files import model_files
    from treeq_export.targets.names import FP32

    run = workspace.run
    targets = (FP32, *workspace.recipe.compile.targets)
    files = [file for target in targets for file in model_files(run / RunFolder.graph(target))]
    return [RunFolder.COMPILE, *(str(file.relative_to(run)) for file in files)]


def _validate(workspace: "Workspace", on_step: OnStep) -> None:
    from treeq_export.validate.stage import run_validate

    recipe = workspace.recipe
    run_validate(
        workspace.run,
        workspace.denoiser,
        workspace.plan,
        workspace.tensors,
        recipe.compile.targets,
        recipe.validate_,
        recipe.seed,
        on_step,
    )


def _bench(workspace: "Workspace", on_step: OnStep) -> None:
    from treeq_export.bench.stage import run_bench
    from treeq_export.targets.table import different_ways

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


def _evaluate(workspace: "Workspace", on_step: OnStep) -> None:
    from treeq_export.evaluate.stage import run_evaluate
    from treeq_export.model.quantized import quantize_model
    from treeq_export.runners.torch_runner import TorchRunner
    from treeq_export.targets.table import open_way

    recipe, denoiser = workspace.recipe, workspace.denoiser
    with ExitStack() as stack:
        baseline = open_baseline(workspace, stack)
        if recipe.evaluate.runner == "torch":
            runner = TorchRunner(quantize_model(denoiser, workspace.plan, workspace.tensors))
        else:
            runner = open_way(workspace.run, recipe.evaluate.runner)
        run_evaluate(
            workspace.run,
            denoiser,
            stack.enter_context(runner),
            recipe,
            on_step=on_step,
            baseline=baseline,
            fp_samples=workspace.fp_samples,
            say=workspace.say,
        )


def open_baseline(workspace: "Workspace", stack: ExitStack) -> "Baseline | None":
    """Enter the runner of what the same budget gives without search and finetune, if wanted."""
    from treeq_export.evaluate.samples import digest_quantized
    from treeq_export.evaluate.stage import Baseline
    from treeq_export.model.quantized import quantize_model
    from treeq_export.runners.torch_runner import TorchRunner

    made = baseline_of(workspace.recipe)
    if made is None:
        return None
    with workspace.sibling(workspace.run / made.folder, made.recipe) as uniform:
        quantized = quantize_model(workspace.denoiser, uniform.plan, uniform.tensors)
        runner = stack.enter_context(TorchRunner(quantized))
        return Baseline(uniform.plan, runner, digest_quantized(uniform.run, "torch"))


def baseline_of(recipe: "Recipe") -> Sibling | None:
    """Return the run of strategy "uniform": same budget, exclusions and fixed branch."""
    if recipe.evaluate.baseline is None:
        return None
    search = recipe.search.model_copy(update={"strategy": "uniform", "branch_budget": None})
    uniform = recipe.model_copy(update={"search": search})
    return Sibling(RunFolder.BASELINE, uniform, ("search", "calibrate"))


def _report(workspace: "Workspace", on_step: OnStep) -> "Report":
    from treeq_export.report import write_report

    report = read_report(workspace)
    write_report(report)
    on_step(1.0)
    return report


def read_report(workspace: "Workspace") -> "Report":
    """Return the report of a run without writing it.

    Raises:
        PlanError: The plan or compile.json is missing, or a record is malformed.
    """
    from treeq_export.report import make_report

    done, recipe = workspace.stages, workspace.recipe
    seconds = {name: done[name].seconds for name in STAGE_NAMES if name in done}
    commands = workspace.reproduce_commands()
    return make_report(workspace.run, stages=seconds, recipe=recipe, commands=commands)


STAGES = (
    Stage(
        "search",
        _search,
        sections=_search_sections,
        after=lambda _: (),
        outputs=lambda _: [RunFolder.PLAN, RunFolder.SEARCH],
        record=RunFolder.PLAN,
        memory=_search_memory,
        edited={RunFolder.PLAN: _is_plan_of_recipe},
    ),
    Stage(
        "calibrate",
        _calibrate,
        sections=lambda _: ("model", "sampler", "calibrate", "seed"),
        after=lambda _: ("search",),
        outputs=lambda _: [RunFolder.PLAN, RunFolder.TENSORS, RunFolder.CALIBRATION],
        record=RunFolder.CALIBRATION,
        summary="Find scales, codes and branches.\n\nWrites plan.safetensors.",
        memory=_calibrate_memory,
    ),
    Stage(
        "finetune",
        _finetune,
        sections=lambda _: ("model", "sampler", "finetune", "seed"),
        after=lambda _: ("calibrate",),
        outputs=_finetuned_files,
        record=RunFolder.FINETUNE,
        summary="Train branches and scales by distillation.\n\n"
        "The key finetune.mode of the recipe chooses what is trained.",
        idle=lambda recipe: (
            "finetune.mode is none: nothing was trained."
            if recipe.finetune.mode == "none"
            else None
        ),
        memory=_finetune_memory,
    ),
    Stage(
        "compile",
        _compile,
        sections=lambda _: ("model", "compile"),
        after=lambda _: ("finetune",),
        outputs=_compiled_files,
        record=RunFolder.COMPILE,
        summary="Write and audit the ONNX graphs of all targets.",
    ),
    Stage(
        "validate",
        _validate,
        sections=lambda _: ("validate", "seed"),
        after=lambda _: ("compile",),
        outputs=lambda _: [RunFolder.PARITY],
        record=RunFolder.PARITY,
        memory=lambda recipe: {"validate.batch_size": recipe.validate_.batch_size},
    ),
    Stage(
        "bench",
        _bench,
        sections=lambda _: ("bench", "seed"),
        after=lambda _: ("compile",),
        outputs=lambda _: [RunFolder.BENCH],
        record=RunFolder.BENCH,
        summary="Time all targets in one interleaved run, and their memory.",
        memory=lambda recipe: {"bench.batch_sizes": max(recipe.bench.batch_sizes)},
    ),
    Stage(
        "evaluate",
        _evaluate,
        sections=lambda _: ("sampler", "evaluate", "seed"),
        after=lambda recipe: ("finetune" if recipe.evaluate.runner == "torch" else "compile",),
        outputs=lambda _: [RunFolder.QUALITY],
        record=RunFolder.QUALITY,
        summary="Sample images with equal seeds and score them.\n\n"
        "Exit status 3 if a gate is not met.",
        memory=lambda recipe: {
            "evaluate.num_samples": recipe.evaluate.num_samples,
            "sampler.batch_size": 0,
        },
        sibling=baseline_of,
    ),
    Stage(
        "report",
        _report,
        sections=lambda _: (),
        after=lambda _: ("validate", "bench", "evaluate"),
        outputs=lambda _: [RunFolder.REPORT, RunFolder.PAGE],
        record=RunFolder.REPORT,
        always=True,
    ),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)
