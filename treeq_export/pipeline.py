"""All stages in order, each skipped while what it depends on has not changed.

A stage is up to date when its fingerprint (its recipe sections, the checkpoint, the fingerprint of
the stages before it, the version of treeq-export) and the digests of its output files are those of
`run.json`. Interrupting loses the stage that is at work, never a finished one.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from treeq_export import __version__
from treeq_export.artefacts import sha256_of_file
from treeq_export.bench.stage import run_bench
from treeq_export.calibrate import run_calibrate
from treeq_export.compile.stage import run_compile
from treeq_export.errors import GateError, PlanError
from treeq_export.evaluate.stage import run_evaluate
from treeq_export.model.quantized import quantize_model
from treeq_export.records import GateResult, ParityRecord, QualityRecord, load_record
from treeq_export.report import Report, write_report
from treeq_export.runners.compiled import model_path
from treeq_export.runners.ort_runner import OrtRunner
from treeq_export.runners.torch_runner import TorchRunner
from treeq_export.search.stage import run_search
from treeq_export.validate import run_validate
from treeq_export.workspace import StageRecord, Workspace

OnStep = Callable[[float], None]
# Opens a progress bar for a stage (name, whether it is skipped) and returns its callback.
OnStage = Callable[[str, bool], OnStep]


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline.

    Attributes:
        name: Also the command's name.
        sections: Recipe sections that its result depends on.
        after: Stages whose results it reads.
        outputs: Files it writes, relative to the run folder.
        execute: Does the work.
    """

    name: str
    sections: tuple[str, ...]
    after: tuple[str, ...]
    outputs: Callable[[Workspace], list[str]]
    execute: Callable[[Workspace, OnStep], object]


def _search(workspace: Workspace, on_step: OnStep) -> None:
    workspace.forget_plan()
    run_search(workspace.run, workspace.denoiser, workspace.checkpoint, workspace.recipe, on_step)


def _calibrate(workspace: Workspace, on_step: OnStep) -> None:
    plan = workspace.plan
    workspace.forget_plan()
    run_calibrate(workspace.run, workspace.denoiser, plan, workspace.recipe, on_step)


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
        list(workspace.recipe.compile.targets),
        workspace.recipe.validate_,
        workspace.recipe.seed,
        on_step,
    )


def _bench(workspace: Workspace, on_step: OnStep) -> None:
    recipe = workspace.recipe
    run_bench(
        workspace.run,
        workspace.denoiser,
        recipe.bench,
        targets=["torch_fp32", "ort_fp32", "ort_int8", *recipe.compile.targets],
        seed=recipe.seed,
        on_step=on_step,
        model=recipe.model,
    )


def _evaluate(workspace: Workspace, on_step: OnStep) -> None:
    recipe = workspace.recipe
    name = recipe.evaluate.runner
    if name == "torch":
        quantized = quantize_model(workspace.denoiser, workspace.plan, workspace.tensors)
        runner = TorchRunner(quantized)
    else:
        runner = OrtRunner(model_path(workspace.run, name))
    with runner:
        run_evaluate(workspace.run, workspace.denoiser, runner, recipe, on_step=on_step)


def _report(workspace: Workspace, on_step: OnStep) -> Report:
    seconds = {name: record.seconds for name, record in workspace.stages.items()}
    report = write_report(
        workspace.run,
        stages={stage.name: seconds[stage.name] for stage in STAGES if stage.name in seconds},
        recipe=workspace.recipe,
        commands=reproduce_commands(workspace),
    )
    on_step(1.0)
    return report


def _compiled_files(workspace: Workspace) -> list[str]:
    return ["compile.json", "onnx/fp32/model.onnx"] + [
        f"onnx/{target}/model.onnx" for target in workspace.recipe.compile.targets
    ]


STAGES = (
    Stage("search", ("name", "model", "search"), (), lambda _: ["plan.json"], _search),
    Stage(
        "calibrate",
        ("model", "sampler", "calibrate", "seed"),
        ("search",),
        lambda _: ["plan.json", "plan.safetensors", "calibration.json"],
        _calibrate,
    ),
    Stage("compile", ("model", "compile"), ("calibrate",), _compiled_files, _compile),
    Stage("validate", ("validate", "seed"), ("compile",), lambda _: ["parity.json"], _validate),
    Stage("bench", ("bench", "seed"), ("compile",), lambda _: ["bench.json"], _bench),
    Stage(
        "evaluate",
        ("sampler", "evaluate"),
        ("compile",),
        lambda _: ["quality.json"],
        _evaluate,
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


def stage_named(name: str) -> Stage:
    """Return the stage of that name."""
    return next(stage for stage in STAGES if stage.name == name)


def reproduce_commands(workspace: Workspace) -> list[str]:
    """Return the command lines that repeat a run."""
    recipe = workspace.recipe_path or "RECIPE"
    settings = "".join(f" --set {override}" for override in workspace.overrides)
    return [
        f"pip install treeq-export=={__version__}",
        f"treeq-export run {recipe} --out {workspace.run.name}{settings}",
    ]


def fingerprint(workspace: Workspace, stage: Stage) -> str:
    """Return the digest of everything that a stage's result depends on."""
    recipe = workspace.recipe.model_dump(mode="json", by_alias=True)
    depends = {
        "version": __version__,
        "stage": stage.name,
        "checkpoint": workspace.checkpoint.sha256,
        "sections": {name: recipe[name] for name in stage.sections},
        "files": [
            sha256_of_file(Path(path))
            for path in _input_files(workspace, stage)
            if path is not None and Path(path).is_file()
        ],
        "after": [fingerprint(workspace, stage_named(name)) for name in stage.after],
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def _input_files(workspace: Workspace, stage: Stage) -> list[str | None]:
    recipe = workspace.recipe
    files = [recipe.model.conditioning] if "model" in stage.sections else []
    if "evaluate" in stage.sections:
        files += [recipe.evaluate.classifier, recipe.evaluate.reference]
    return files


def is_up_to_date(workspace: Workspace, stage: Stage) -> bool:
    """Whether a stage's result is there and nothing that it depends on has changed."""
    record = workspace.stages.get(stage.name)
    if record is None or record.fingerprint != fingerprint(workspace, stage):
        return False
    # calibrate completes the plan that search wrote, so search answers for its fingerprint alone.
    if stage.name == "search" and "calibrate" in workspace.stages:
        return (workspace.run / "plan.json").is_file()
    return all(
        (workspace.run / name).is_file() and sha256_of_file(workspace.run / name) == digest
        for name, digest in record.outputs.items()
    )


def run_stage(workspace: Workspace, stage: Stage, on_step: OnStep) -> object:
    """Run one stage and record it.

    Args:
        workspace: The run.
        stage: The stage; what it reads has to be there.
        on_step: Called with the fraction done, 0..1.

    Returns:
        The stage's result, if any.

    Raises:
        TreeqError: Whatever the stage raises.
    """
    workspace.stages = {
        name: record
        for name, record in workspace.stages.items()
        if name in STAGE_NAMES and name not in _dependents(stage)
    }
    workspace.save()
    started = time.monotonic()
    result = stage.execute(workspace, on_step)
    workspace.stages[stage.name] = StageRecord(
        fingerprint=fingerprint(workspace, stage),
        seconds=round(time.monotonic() - started, 3),
        outputs={name: sha256_of_file(workspace.run / name) for name in stage.outputs(workspace)},
    )
    workspace.save()
    return result


def _dependents(stage: Stage) -> set[str]:
    """Return the names of a stage and of all stages that read its results."""
    found = {stage.name}
    for later in STAGES:
        if found & set(later.after):
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
        TreeqError: A stage failed; finished stages are kept.
    """
    again = False
    report: object = None
    for stage in STAGES:
        again = again or stage.name == start
        current = stage.name != "report" and not again and is_up_to_date(workspace, stage)
        on_step = on_stage(stage.name, current)
        if not current:
            report = run_stage(workspace, stage, on_step)
    assert isinstance(report, Report)
    return report


def gate_results(
    run: Path, files: Sequence[str] = ("parity.json", "quality.json")
) -> list[GateResult]:
    """Return the gates of the records that are there."""
    gates: list[GateResult] = []
    if "parity.json" in files and (run / "parity.json").is_file():
        parity = load_record(run / "parity.json", ParityRecord, "validate")
        gates += [gate for target in parity.targets for gate in target.gates]
    if "quality.json" in files and (run / "quality.json").is_file():
        gates += load_record(run / "quality.json", QualityRecord, "evaluate").gates
    return gates


def check_gates(gates: list[GateResult]) -> None:
    """Check that all gates are met.

    Raises:
        GateError: Names the gates that are not, with what was measured.
    """
    failed = [gate for gate in gates if not gate.passed]
    if failed:
        listed = "; ".join(
            f"{gate.name}: measured {gate.measured:.4g}, "
            f"required {'at least' if gate.at_least else 'at most'} {gate.limit:.4g}"
            for gate in failed
        )
        raise GateError(f"{len(failed)} of {len(gates)} gates are not met: {listed}.")


def require_stages(workspace: Workspace, stage: Stage) -> None:
    """Check that the stages that one reads have run.

    Raises:
        PlanError: Names the first stage to run.
    """
    for name in stage.after:
        if stage.name != "report" and name not in workspace.stages:
            raise PlanError(
                f"{workspace.run}: {stage.name} needs the result of {name}. "
                f"Run `treeq-export {name} --run {workspace.run}` first."
            )
