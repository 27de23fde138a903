"""What a report is made of: the records of a run, and whether its gates are met."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from treeq_export.artefacts import sha256_of_file
from treeq_export.plan import FINETUNE_FILE, PLAN_FILE, Plan, load_plan
from treeq_export.recipe import Recipe
from treeq_export.records import (
    BenchRecord,
    BuildRecord,
    BuiltEngine,
    CompileRecord,
    FinetuneRecord,
    GateResult,
    ParityRecord,
    QualityRecord,
    Record,
    SearchRecord,
    load_record,
)
from treeq_export.targets.names import FP32

# The section of report.json that a stage fills.
STAGE_OF_SECTION = {"parity": "validate", "quality": "evaluate", "bench": "bench"}

Measured = TypeVar("Measured", bound=Record)


@dataclass(frozen=True)
class Evidence:
    """Everything a report is made of, as the stages left it.

    Attributes:
        run: The run folder.
        plan: Its plan.
        plan_sha256: Digest of plan.json.
        recipe: The recipe, with absolute paths.
        compiled: Result of compile.
        parity: Result of validate; None if it has not run.
        bench: Result of bench; None if it has not run.
        quality: Result of evaluate; None if it has not run.
        search: How the search went; None where search.json is missing.
        finetune: Result of finetune; None if nothing was trained.
        build: Result of build; None if no engine was built.
        commands: Command lines that repeat the run.
    """

    run: Path
    plan: Plan
    plan_sha256: str
    recipe: Recipe
    compiled: CompileRecord
    parity: ParityRecord | None
    bench: BenchRecord | None
    quality: QualityRecord | None
    search: SearchRecord | None
    finetune: FinetuneRecord | None
    build: BuildRecord | None
    commands: tuple[str, ...]

    @property
    def gates(self) -> list[GateResult]:
        """All gates that were measured: parity, target by target, then quality."""
        targets = self.parity.targets if self.parity else []
        gates = [gate for target in targets for gate in target.gates]
        return gates + (self.quality.gates if self.quality else [])

    @property
    def targets(self) -> list[str]:
        """The compiled targets but the float32 graph; the one that made the images first."""
        names = [entry.target for entry in self.compiled.targets if entry.target != FP32]
        runner = self.quality.runner if self.quality else None
        return sorted(names, key=lambda name: name != runner)

    @property
    def engines(self) -> list[BuiltEngine]:
        """The engines that were built from the graphs as they are now."""
        current = {entry.sha256 for entry in self.compiled.targets}
        built = self.build.engines if self.build else []
        return [engine for engine in built if engine.manifest.graph_sha256 in current]

    @property
    def missing(self) -> list[str]:
        """Sections that have not been measured."""
        return [name for name in STAGE_OF_SECTION if getattr(self, name) is None]


@dataclass(frozen=True)
class Verdict:
    """Whether the gates are met.

    Attributes:
        state: "failed" if one is not; "incomplete" if nothing failed but not all was measured.
        headline: One line that says so.
        failed: Names of what failed.
        missing: Sections that have not been measured.
    """

    state: Literal["passed", "failed", "incomplete"]
    headline: str
    failed: tuple[str, ...]
    missing: tuple[str, ...]


def read_evidence(run: Path, recipe: Recipe, commands: list[str]) -> Evidence:
    """Read the records of a run.

    Args:
        run: The run folder; plan.json and compile.json have to be there.
        recipe: The recipe of the run.
        commands: Command lines that repeat the run.

    Raises:
        PlanError: The plan or compile.json is missing, or a record is malformed; the message
            names the stage to run.
    """
    return Evidence(
        run=run,
        plan=load_plan(run),
        plan_sha256=sha256_of_file(run / PLAN_FILE),
        recipe=recipe,
        compiled=load_record(run / "compile.json", CompileRecord, "compile"),
        parity=_read_optional(run / "parity.json", ParityRecord, "validate"),
        bench=_read_optional(run / "bench.json", BenchRecord, "bench"),
        quality=_read_optional(run / "quality.json", QualityRecord, "evaluate"),
        search=_read_optional(run / "search.json", SearchRecord, "search"),
        finetune=_read_optional(run / FINETUNE_FILE, FinetuneRecord, "finetune"),
        build=_read_optional(run / "build.json", BuildRecord, "build"),
        commands=tuple(commands),
    )


def _read_optional(path: Path, kind: type[Measured], stage: str) -> Measured | None:
    return load_record(path, kind, stage) if path.is_file() else None


def judge(evidence: Evidence) -> Verdict:
    """Say whether the gates of a run are met."""
    gates, missing = evidence.gates, evidence.missing
    failed = [gate.name for gate in gates if not gate.passed]
    failed += [
        f"{target.target} parity"
        for target in (evidence.parity.targets if evidence.parity else [])
        if not target.passed and all(gate.passed for gate in target.gates)
    ]
    state: Literal["passed", "failed", "incomplete"] = "passed"
    headline = f"All {len(gates)} gates passed"
    if failed:
        state = "failed"
        headline = f"{len(failed)} of {max(len(gates), len(failed))} gates failed"
    elif missing:
        state = "incomplete"
        headline = f"Incomplete: {', '.join(missing)} not measured"
    elif not gates:
        state, headline = "incomplete", "No gate was set: nothing to pass or fail"
    return Verdict(state, headline, tuple(failed), tuple(missing))
