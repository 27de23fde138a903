"""`report.json`: the summary of a run, built from the records of its stages.

The keys are those of design.md, section 7; other programs rely on them. What was not measured is
null: `quality`, `parity` and `bench` as a whole, and single scores within `quality`. The file is
strict JSON: a number that is not finite is one of the strings "Infinity", "-Infinity" and "NaN"
(an SQNR of "Infinity" is a bit-exact layer).

    bench.speedup   against ONNX Runtime in float32 ("ort_fp32") where that was timed, otherwise
                    against the first baseline of bench.json; at the first batch size timed
    quality         means over the seeds of quality.json; `seed` is the first of them
    size.fp32_bytes the float32 graph of the same exporter; 4 bytes a parameter if none was written
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, InstanceOf

from treeq_export.artefacts import sha256_of_file
from treeq_export.plan import PLAN_FILE, Plan, load_plan
from treeq_export.recipe import Recipe
from treeq_export.records import (
    BenchRecord,
    CompileRecord,
    GateResult,
    LayerParity,
    ParityRecord,
    QualityRecord,
    Record,
    Speedup,
    load_record,
)

REPORT_FILE = "report.json"
HTML_FILE = "report.html"
FP32 = "fp32"
PREFERRED_BASELINE = "ort_fp32"

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
    def missing(self) -> list[str]:
        """Sections that have not been measured."""
        return [name for name in STAGE_OF_SECTION if getattr(self, name) is None]


class Summary(BaseModel):
    """Base of the parts of report.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class ModelSummary(Summary):
    """The model."""

    name: str
    num_parameters: int
    num_quantized_layers: int


class PlanSummary(Summary):
    """The plan; bits are means weighted by the number of weights."""

    average_weight_bits: float
    average_activation_bits: float
    branch_parameter_fraction: float


class FullPrecisionScores(Summary):
    """Scores of the full-precision images; None where there is no classifier."""

    frechet_distance: float | None
    class_accuracy: float | None


class QuantizedScores(FullPrecisionScores):
    """Scores of the quantized images; psnr_db is against full precision with equal seeds."""

    psnr_db: float | None


class QualitySummary(Summary):
    """Image quality: means over the seeds; `num_samples` images for each."""

    fp: FullPrecisionScores
    quantized: QuantizedScores
    num_samples: int
    seed: int


class LayerSummary(Summary):
    """Parity of one layer; equal_code_fraction is None where activations are floating point."""

    name: str
    sqnr_db: float
    equal_code_fraction: float | None


Layer = TypeVar("Layer", LayerSummary, LayerParity)


class ParitySummary(Summary):
    """Parity of one target; sqnr_db and max_abs_error are end to end."""

    passed: bool
    sqnr_db: float
    max_abs_error: float
    layers: list[LayerSummary]


class BenchRowSummary(Summary):
    """Times of one target at one batch size, in milliseconds."""

    target: str
    batch: int
    median_ms: float
    all_times_ms: list[float]


class SpeedupSummary(Summary):
    """Baseline time over target time, with its 95 % interval; above 1 is faster."""

    ratio: float
    low: float
    high: float


class BenchSummary(Summary):
    """Speed."""

    rows: list[BenchRowSummary]
    speedup: dict[str, SpeedupSummary]
    environment: dict[str, Any]


class Report(Summary):
    """The content of report.json.

    Attributes:
        model: The model.
        plan: Its plan.
        quality: Image quality; None if not measured.
        parity: By target; None if not measured.
        bench: Speed; None if not measured.
        size: Bytes: "fp32_bytes", and one entry per target.
        stages: Seconds per stage.
        evidence: What it was made of; not part of the file, None when read back from it.
    """

    model: ModelSummary
    plan: PlanSummary
    quality: QualitySummary | None
    parity: dict[str, ParitySummary] | None
    bench: BenchSummary | None
    size: dict[str, int]
    stages: dict[str, float]
    evidence: InstanceOf[Evidence] | None = Field(default=None, exclude=True, repr=False)


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
        commands=tuple(commands),
    )


def _read_optional(path: Path, kind: type[Measured], stage: str) -> Measured | None:
    return load_record(path, kind, stage) if path.is_file() else None


def summarize(evidence: Evidence, stages: dict[str, float]) -> Report:
    """Build the summary of a run.

    Args:
        evidence: The records of the run.
        stages: Seconds that each stage took.
    """
    plan = evidence.plan
    return Report(
        model=ModelSummary(
            name=plan.model.name,
            num_parameters=plan.model.num_parameters,
            num_quantized_layers=len(plan.layers),
        ),
        plan=PlanSummary(
            average_weight_bits=plan.average_weight_bits,
            average_activation_bits=plan.average_activation_bits,
            branch_parameter_fraction=plan.branch_parameter_fraction,
        ),
        quality=_summarize_quality(evidence.quality),
        parity=_summarize_parity(evidence.parity),
        bench=_summarize_bench(evidence.bench),
        size=_summarize_size(evidence),
        stages=stages,
        evidence=evidence,
    )


def _summarize_quality(record: QualityRecord | None) -> QualitySummary | None:
    if record is None:
        return None
    full, quantized = record.fp, record.quantized
    return QualitySummary(
        fp=FullPrecisionScores(
            frechet_distance=full.frechet_distance, class_accuracy=full.class_accuracy
        ),
        quantized=QuantizedScores(
            frechet_distance=quantized.frechet_distance,
            class_accuracy=quantized.class_accuracy,
            psnr_db=quantized.psnr_db,
        ),
        num_samples=record.num_samples,
        seed=record.seeds[0].seed,
    )


def _summarize_parity(record: ParityRecord | None) -> dict[str, ParitySummary] | None:
    if record is None:
        return None
    return {
        target.target: ParitySummary(
            passed=target.passed,
            sqnr_db=target.sqnr_db,
            max_abs_error=target.max_abs_error,
            layers=[
                LayerSummary(
                    name=layer.name,
                    sqnr_db=layer.sqnr_db,
                    equal_code_fraction=layer.equal_code_fraction,
                )
                for layer in target.layers
            ],
        )
        for target in record.targets
    }


def _summarize_bench(record: BenchRecord | None) -> BenchSummary | None:
    if record is None:
        return None
    return BenchSummary(
        rows=[BenchRowSummary(**row.model_dump()) for row in record.rows],
        speedup={
            speedup.target: SpeedupSummary(ratio=speedup.ratio, low=speedup.low, high=speedup.high)
            for speedup in headline_speedups(record)
        },
        environment=record.environment,
    )


def headline_speedups(record: BenchRecord) -> list[Speedup]:
    """Return the speedups of report.json: one baseline, the first batch size."""
    against = baseline_speedups(record)
    batch = record.rows[0].batch if record.rows else None
    return [speedup for speedup in against if speedup.batch == batch]


def baseline_speedups(record: BenchRecord) -> list[Speedup]:
    """Return all speedups against the one baseline that the report uses."""
    baselines = [speedup.baseline for speedup in record.speedups]
    if PREFERRED_BASELINE in baselines:
        baselines = [PREFERRED_BASELINE]
    return [speedup for speedup in record.speedups if speedup.baseline in baselines[:1]]


def _summarize_size(evidence: Evidence) -> dict[str, int]:
    sizes = {entry.target: entry.size_bytes for entry in evidence.compiled.targets}
    full = sizes.pop(FP32, 4 * evidence.plan.model.num_parameters)
    return {"fp32_bytes": full, **sizes}


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


def sort_worst_first(layers: Iterable[Layer]) -> list[Layer]:
    """Return layers by ascending own SQNR: nan first, then -inf; equal ones in the order given."""
    return sorted(
        layers,
        key=lambda layer: (0, 0.0) if math.isnan(layer.sqnr_db) else (1, layer.sqnr_db),
    )


def report_to_json(report: Report) -> dict[str, Any]:
    """Return what `report.json` holds; strings stand for numbers that are not finite."""
    return json.loads(report.model_dump_json())
