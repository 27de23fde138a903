"""The report of a run: its records, and whether its gates are met."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from treeq_export.artefacts import sha256_of_file
from treeq_export.plan import Plan, load_plan
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
from treeq_export.report.quantities import name_with_runtime
from treeq_export.run_folder import RunFolder
from treeq_export.targets.names import FP32

# The section of report.json that a stage fills.
STAGE_OF_SECTION = {"parity": "validate", "quality": "evaluate", "bench": "bench"}

Measured = TypeVar("Measured", bound=Record)


@dataclass(frozen=True)
class Report:
    """The records of a run as the stages left them; report.json, the page and the terminal show it.

    Attributes:
        run: The run folder.
        stages: Seconds that each stage took.
        plan: The run's plan.
        plan_sha256: Digest of plan.json.
        recipe: The recipe, with absolute paths.
        compiled: Result of compile.
        parity: Result of validate; None if it has not run.
        bench: Result of bench; None if it has not run.
        quality: Result of evaluate; None if it has not run.
        search: Result of search; None where search.json is missing.
        finetune: Result of finetune; None if nothing was trained.
        build: Result of build; None if no engine was built.
        commands: Command lines that repeat the run.
    """

    run: Path
    stages: dict[str, float]
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
        return [gate for group in self.gate_groups for gate in group.gates]

    @property
    def gate_groups(self) -> list["GateGroup"]:
        """The gates by target, then those of the images; groups without gates are left out."""
        groups = [
            GateGroup(name_with_runtime(target.target, target.runtime), target.gates)
            for target in (self.parity.targets if self.parity else [])
        ]
        groups.append(GateGroup("images", self.quality.gates if self.quality else []))
        return [group for group in groups if group.gates]

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
    def size(self) -> dict[str, int]:
        """Bytes: "fp32_bytes", or 4 a parameter without that graph, and an entry per target."""
        sizes = {entry.target: entry.size_bytes for entry in self.compiled.targets}
        full = sizes.pop(FP32, 4 * self.plan.model.num_parameters)
        return {"fp32_bytes": full, **sizes}

    @property
    def missing(self) -> list[str]:
        """Sections that have not been measured."""
        return [name for name in STAGE_OF_SECTION if getattr(self, name) is None]


@dataclass(frozen=True)
class GateGroup:
    """Gates that are shown together.

    Attributes:
        title: The target with its runtime, or "images".
        gates: The gates, one at least.
    """

    title: str
    gates: list[GateResult]

    @property
    def num_passed(self) -> int:
        """Number of gates that are met."""
        return sum(gate.passed for gate in self.gates)

    def short_name(self, gate: GateResult) -> str:
        """Return a gate's name without its target, which the title says."""
        return gate.name.partition(": ")[2] or gate.name


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


def make_report(
    run: Path, *, stages: dict[str, float], recipe: Recipe, commands: list[str]
) -> Report:
    """Return the report of a run without writing it.

    Args:
        run: The run folder; plan.json and compile.json have to exist.
        stages: Seconds that each stage took.
        recipe: The recipe of the run.
        commands: Command lines that repeat the run.

    Raises:
        PlanError: The plan or compile.json is missing, or a record is malformed; the message
            names the stage to run.
    """
    return Report(
        run=run,
        stages={name: float(seconds) for name, seconds in stages.items()},
        plan=load_plan(run),
        plan_sha256=sha256_of_file(run / RunFolder.PLAN),
        recipe=recipe,
        compiled=load_record(run / RunFolder.COMPILE, CompileRecord, "compile"),
        parity=_read_optional(run / RunFolder.PARITY, ParityRecord, "validate"),
        bench=_read_optional(run / RunFolder.BENCH, BenchRecord, "bench"),
        quality=_read_optional(run / RunFolder.QUALITY, QualityRecord, "evaluate"),
        search=_read_optional(run / RunFolder.SEARCH, SearchRecord, "search"),
        finetune=_read_optional(run / RunFolder.FINETUNE, FinetuneRecord, "finetune"),
        build=_read_optional(run / RunFolder.BUILD, BuildRecord, "build"),
        commands=tuple(commands),
    )


def _read_optional(path: Path, kind: type[Measured], stage: str) -> Measured | None:
    return load_record(path, kind, stage) if path.is_file() else None


def judge(report: Report) -> Verdict:
    """Say whether the gates of a run are met."""
    gates, missing = report.gates, report.missing
    failed = [gate.name for gate in gates if not gate.passed]
    failed += [
        f"{target.target} parity"
        for target in (report.parity.targets if report.parity else [])
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
