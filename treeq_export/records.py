"""Results of the stages, as records. One record, many views: terminal, JSON and HTML read these.

compile.json: CompileRecord; parity.json: ParityRecord; bench.json: BenchRecord; quality.json:
QualityRecord.
"""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from treeq_export.artefacts import write_json
from treeq_export.errors import PlanError

Model = TypeVar("Model", bound=BaseModel)


class Record(BaseModel):
    """Base of all records; non-finite numbers are written as JSON strings ("Infinity", "NaN")."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class GateResult(Record):
    """One gate: what was measured against which limit.

    Attributes:
        name: Such as "portable end-to-end sqnr_db".
        measured: The value.
        limit: The recipe's limit.
        at_least: Whether the value has to be at least (True) or at most (False) the limit.
        passed: Whether it is.
    """

    name: str
    measured: float
    limit: float
    at_least: bool
    passed: bool

    @classmethod
    def of(cls, name: str, measured: float, limit: float, *, at_least: bool) -> "GateResult":
        """Return the result of comparing; nan never passes."""
        passed = measured >= limit if at_least else measured <= limit
        return cls(name=name, measured=measured, limit=limit, at_least=at_least, passed=passed)


class AuditLayer(Record):
    """What a quantized layer became in the runtime's optimized graph.

    Attributes:
        name: The layer.
        op_type: Node that does its matrix product, such as "MatMulIntegerToFloat".
        integer: Whether that is integer arithmetic.
        weight_only: True where the plan keeps the activation in floating point.
    """

    name: str
    op_type: str
    integer: bool
    weight_only: bool = False


class CompiledTarget(Record):
    """One compiled graph.

    Attributes:
        target: "portable", "ort", ... or "fp32" for the unquantized graph of the same exporter.
        path: Model file, relative to the run folder.
        size_bytes: Model and external data together.
        sha256: Digest of the model file.
        audit: One entry per quantized layer, in execution order.
    """

    target: str
    path: str
    size_bytes: int
    sha256: str
    audit: list[AuditLayer]


class CompileRecord(Record):
    """Result of compile; the last entry of `targets` may be "fp32"."""

    targets: list[CompiledTarget]


class LayerParity(Record):
    """Parity of one layer between the torch reference and a target.

    Attributes:
        name: The layer.
        sqnr_db: Own error: the target's layer on the reference's input.
        max_abs_error: Of the same.
        equal_code_fraction: Equal activation codes on the reference's input; None if not quantized.
        accumulators_equal: int32 sums equal, given equal codes; None if not quantized.
        propagated_sqnr_db: The layer's output inside the whole network.
        quantization_sqnr_db: Output of the quantized layer against the full-precision layer.
    """

    name: str
    sqnr_db: float
    max_abs_error: float
    equal_code_fraction: float | None
    accumulators_equal: bool | None
    propagated_sqnr_db: float
    quantization_sqnr_db: float


class TargetParity(Record):
    """Parity of one target; `sqnr_db` and `max_abs_error` are end to end."""

    target: str
    passed: bool
    sqnr_db: float
    max_abs_error: float
    layers: list[LayerParity]
    gates: list[GateResult]


class ParityRecord(Record):
    """Result of validate."""

    batch_size: int
    seed: int
    targets: list[TargetParity]


class BenchRow(Record):
    """All raw times of one target at one batch size.

    Attributes:
        target: "torch_fp32", "ort_fp32", "ort_int8" (onnxruntime.quantization) or our target.
        batch: Images per call.
        median_ms: Median of all_times_ms.
        all_times_ms: Wall time of each round, in order.
    """

    target: str
    batch: int
    median_ms: float
    all_times_ms: list[float]


class BenchMemory(Record):
    """Memory of one target in a process of its own: resident after load, and peak, in bytes."""

    target: str
    after_load_bytes: int
    peak_bytes: int
    load_s: float
    file_bytes: int


class Speedup(Record):
    """Median of baseline / target over the rounds, with a 95 % bootstrap interval."""

    target: str
    baseline: str
    batch: int
    ratio: float
    low: float
    high: float


class BenchRecord(Record):
    """Result of bench."""

    rows: list[BenchRow]
    memory: list[BenchMemory]
    speedups: list[Speedup]
    environment: dict[str, Any]


class QualityScores(Record):
    """Scores of one set of images; None where there is no classifier.

    Attributes:
        frechet_distance: Between features of the images and of real ones.
        class_accuracy: Fraction classified as the class they were conditioned on.
        psnr_db: To full precision with equal seeds; None for full precision itself.
    """

    frechet_distance: float | None
    class_accuracy: float | None
    psnr_db: float | None = None


class SeedQuality(Record):
    """Scores for one seed."""

    seed: int
    fp: QualityScores
    quantized: QualityScores


class QualityRecord(Record):
    """Result of evaluate; `fp` and `quantized` are means over the seeds.

    Attributes:
        runner: What produced the quantized images.
        conditioning: Where labels or text embeddings came from; "random" where none were given.
        grids: PNG files relative to the run folder, by "fp" and "quantized".
    """

    num_samples: int
    runner: str
    conditioning: str
    seeds: list[SeedQuality]
    fp: QualityScores
    quantized: QualityScores
    grids: dict[str, str]
    gates: list[GateResult]


def save_record(path: Path, record: Record) -> None:
    """Write a record as JSON, atomically.

    Raises:
        OutputError: The folder cannot be written to.
    """
    write_json(path, json.loads(record.model_dump_json()))


def load_record(path: Path, kind: type[Model], stage: str) -> Model:
    """Read a record.

    Args:
        path: The JSON file.
        kind: The record's class.
        stage: The stage that writes it, for the message.

    Raises:
        PlanError: Missing or malformed; names the stage to run first.
    """
    if not path.is_file():
        raise PlanError(f"{path}: missing. Run `treeq-export {stage} --run {path.parent}` first.")
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise PlanError(
            f"{path}: malformed. Run `treeq-export {stage} --run {path.parent}` again."
        ) from error
