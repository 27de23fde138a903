"""Records of compiled graphs: compile.json, parity.json and bench.json."""

from typing import Any

from pydantic import Field

from treeq_export.records.base import GateResult, Record

ORT_CPU = "ONNX Runtime CPU"
EMULATED = f"{ORT_CPU} (emulates the engine)"


class AuditLayer(Record):
    """What a quantized layer became in the runtime's optimized graph.

    Attributes:
        name: The layer.
        op_type: Node that does its matrix product, such as "MatMulIntegerToFloat".
        integer: Whether that is integer arithmetic.
        weight_only: True where the plan keeps the activation in floating point.
        without_kernels: For a layer that our kernels run, what it becomes in a runtime that does
            not have them; None elsewhere.
        exact_sums: Whether int32 sums of extreme codes were exact on the record's processor, as
            found for one layer of each kind; None for weight-only layers.
    """

    name: str
    op_type: str
    integer: bool
    weight_only: bool = False
    without_kernels: str | None = None
    exact_sums: bool | None = None


class CompiledTarget(Record):
    """One compiled graph.

    Attributes:
        target: "portable", "ort", ... or "fp32" for the unquantized graph of the same exporter.
        path: Model file, relative to the run folder.
        size_bytes: Model and external data together.
        sha256: Digest of the model file.
        data_sha256: Digest of its external data, None where it has none.
        audit: One entry per quantized layer, in execution order.
    """

    target: str
    path: str
    size_bytes: int
    sha256: str
    data_sha256: str | None = None
    audit: list[AuditLayer]


class CompileRecord(Record):
    """Result of compile.

    Attributes:
        targets: The graphs that were written; the last entry may be "fp32".
        processor: Model name of the processor that the audit ran on; "" in records of before.
        instruction_sets: Those of `environment.INSTRUCTION_SETS` that it has.
    """

    targets: list[CompiledTarget]
    processor: str = ""
    instruction_sets: list[str] = Field(default_factory=list[str])


class LayerParity(Record):
    """Parity of one layer between the torch reference and a target.

    Attributes:
        name: The layer.
        sqnr_db: Own error: the target's layer on the reference's input.
        max_abs_error: Largest absolute error of the same layer.
        equal_code_fraction: Equal activation codes on the reference's input; None if not quantized.
        accumulators_equal: int32 sums equal, given equal codes; None if not quantized.
        propagated_sqnr_db: The layer's output inside the whole network; None where that value is
            inside a fused node.
        quantization_sqnr_db: Output of the quantized layer against the full-precision layer.
    """

    name: str
    sqnr_db: float
    max_abs_error: float
    equal_code_fraction: float | None
    accumulators_equal: bool | None
    propagated_sqnr_db: float | None
    quantization_sqnr_db: float


class TargetParity(Record):
    """Parity of one target; `sqnr_db` and `max_abs_error` are end to end.

    Attributes:
        target: The target, and how it was run where there are several ways.
        runtime: The runtime; EMULATED where it is not the one that the target is made for.
        passed: Whether all gates are met.
        sqnr_db: SQNR of the network's output, in dB.
        max_abs_error: Largest absolute error of the network's output.
        layers: One entry per quantized layer.
        gates: The gates, that of the network first.
    """

    target: str
    runtime: str = ORT_CPU
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
