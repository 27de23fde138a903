"""`report.json`: the summary of a run, built from the records of its stages.

The keys are those of design.md, section 7; other programs rely on them. What was not measured is
null: `quality`, `parity` and `bench` as a whole, and single scores within `quality`. The file is
strict JSON: a number that is not finite is one of the strings "Infinity", "-Infinity" and "NaN"
(an SQNR of "Infinity" is a bit-exact layer).

    bench.speedup   against ONNX Runtime in float32 ("ort_fp32") where that was timed, otherwise
                    against the first baseline of bench.json; at the first batch size timed
    quality         means over the seeds of quality.json; `seed` is the first of them
    size.fp32_bytes the float32 graph of the same exporter; 4 bytes a parameter if none was written
    search          null where there is no search.json; likewise finetune, quality.baseline, engines
"""

import json
import math
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, InstanceOf

from treeq_export.records import (
    BaselineQuality,
    BenchRecord,
    BuiltEngine,
    FinetuneRecord,
    LayerParity,
    ParityRecord,
    QualityRecord,
    SearchRecord,
    Speedup,
)
from treeq_export.report.evidence import Evidence
from treeq_export.targets.names import FP32

REPORT_FILE = "report.json"
HTML_FILE = "report.html"
PREFERRED_BASELINE = "ort_fp32"


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


class BaselineSummary(QuantizedScores):
    """Scores of uniform bits at the same budget, without search and finetune."""

    strategy: str
    average_weight_bits: float
    average_activation_bits: float
    network_mse: float


class QualitySummary(Summary):
    """Image quality: means over the seeds; `num_samples` images for each.

    `network_mse` is the error of one call's prediction on held-out inputs.
    """

    fp: FullPrecisionScores
    quantized: QuantizedScores
    num_samples: int
    seed: int
    network_mse: float | None = None
    baseline: BaselineSummary | None = None


class SearchSummary(Summary):
    """How the search went; what was announced is the tree's cost, None for other strategies."""

    strategy: str
    noise: float
    budget: dict[str, float]
    num_leaves: int | None
    num_evaluations_announced: int | None
    num_evaluations: int
    estimate_s: float | None
    seconds: float
    network_mse: float | None


class FinetuneSummary(Summary):
    """What training gained on held-out inputs."""

    mode: str
    num_trained: int
    steps: int
    mse_before: float
    mse_after: float
    seconds: float


class LayerSummary(Summary):
    """Parity of one layer; equal_code_fraction is None where activations are floating point."""

    name: str
    sqnr_db: float
    equal_code_fraction: float | None


Layer = TypeVar("Layer", LayerSummary, LayerParity)


class ParitySummary(Summary):
    """Parity of one target; sqnr_db and max_abs_error are end to end, runtime is what ran it."""

    runtime: str
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


class EngineSummary(Summary):
    """One engine: the layers that it has to run in integers, and those that it does."""

    runtime: str
    runtime_version: str
    gpu: str
    target: str
    engine_bytes: int
    build_s: float
    num_quantized: int
    num_verified: int


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
        search: How the search went; None where there is no record of it.
        finetune: What training gained; None where nothing was trained.
        engines: Built and verified, not run; None where there is none of the present graphs.
        evidence: What it was made of; not part of the file, None when read back from it.
    """

    model: ModelSummary
    plan: PlanSummary
    quality: QualitySummary | None
    parity: dict[str, ParitySummary] | None
    bench: BenchSummary | None
    size: dict[str, int]
    stages: dict[str, float]
    search: SearchSummary | None = None
    finetune: FinetuneSummary | None = None
    engines: list[EngineSummary] | None = None
    evidence: InstanceOf[Evidence] | None = Field(default=None, exclude=True, repr=False)


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
        search=_summarize_search(evidence.search),
        finetune=_summarize_finetune(evidence.finetune),
        engines=_summarize_engines(evidence.engines),
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
        network_mse=record.network_mse,
        baseline=_summarize_baseline(record.baseline),
    )


def _summarize_baseline(record: BaselineQuality | None) -> BaselineSummary | None:
    if record is None:
        return None
    return BaselineSummary(
        **record.scores.model_dump(),
        strategy=record.strategy,
        average_weight_bits=record.weight_bits,
        average_activation_bits=record.activation_bits,
        network_mse=record.network_mse,
    )


def _summarize_search(record: SearchRecord | None) -> SearchSummary | None:
    if record is None:
        return None
    cost = record.cost
    announced = cost if record.nodes else None
    return SearchSummary(
        strategy=record.strategy,
        noise=record.noise,
        budget=record.budget,
        num_leaves=cost and cost.num_leaves,
        num_evaluations_announced=announced and announced.num_evaluations,
        num_evaluations=record.num_measured + record.num_from_journal,
        estimate_s=announced and announced.estimate_s,
        seconds=record.seconds,
        network_mse=record.network_mse,
    )


def _summarize_finetune(record: FinetuneRecord | None) -> FinetuneSummary | None:
    if record is None:
        return None
    names = FinetuneSummary.model_fields
    return FinetuneSummary(**record.model_dump(include=set(names)))


def _summarize_engines(engines: list[BuiltEngine]) -> list[EngineSummary] | None:
    names = EngineSummary.model_fields.keys() - {"num_quantized", "num_verified"}
    summaries: list[EngineSummary] = []
    for engine in engines:
        verified = engine.manifest.verifier
        summaries.append(
            EngineSummary(
                **engine.manifest.model_dump(include=set(names)),
                num_quantized=verified.num_quantized,
                num_verified=verified.num_plugins + verified.num_int8_gemms,
            )
        )
    return summaries or None


def _summarize_parity(record: ParityRecord | None) -> dict[str, ParitySummary] | None:
    if record is None:
        return None
    return {
        target.target: ParitySummary(
            runtime=target.runtime,
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


def sort_worst_first(layers: Iterable[Layer]) -> list[Layer]:
    """Return layers by ascending own SQNR: nan first, then -inf; equal ones in the order given."""
    return sorted(
        layers,
        key=lambda layer: (0, 0.0) if math.isnan(layer.sqnr_db) else (1, layer.sqnr_db),
    )


def report_to_json(report: Report) -> dict[str, Any]:
    """Return what `report.json` holds; strings stand for numbers that are not finite."""
    return json.loads(report.model_dump_json())
