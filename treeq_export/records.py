"""Results of the stages, as records. One record, many views: terminal, JSON and HTML read these.

search.json: SearchRecord; finetune.json: FinetuneRecord; compile.json: CompileRecord;
parity.json: ParityRecord; bench.json: BenchRecord; quality.json: QualityRecord;
compare.json: CompareRecord.
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


class SearchPoint(Record):
    """One configuration of the whole network that the search measured.

    Attributes:
        weight_bits: Average, weighted by number of weights.
        activation_bits: Likewise.
        size_bytes: Packed codes, scales and branches of all quantized layers.
        mse: Mean squared error of the network's prediction against full precision.
        kept: Whether the Pareto drop kept it.
        chosen: Whether it is the one that was chosen.
    """

    weight_bits: float
    activation_bits: float
    size_bytes: int
    mse: float
    kept: bool
    chosen: bool


class SearchNode(Record):
    """One node of the search's tree.

    Attributes:
        name: Such as "block 3" or "blocks 0..3"; of a leaf its layers.
        depth: 0 is the root.
        first_leaf: Number of its first leaf.
        last_leaf: Number of its last leaf.
        num_configurations: How many it kept.
        weight_bits: Average of the chosen plan inside it.
        activation_bits: Likewise.
    """

    name: str
    depth: int
    first_leaf: int
    last_leaf: int
    num_configurations: int
    weight_bits: float
    activation_bits: float


class SearchCost(Record):
    """What a search costs, known before it starts.

    Attributes:
        num_leaves: Leaves of the tree.
        num_merges: Merges of two nodes.
        num_evaluations: Configurations to measure; linear in the number of leaves.
        num_block_runs: Block evaluations that these take, each of `num_rows` inputs.
        estimate_s: Estimated seconds, from timing one block; None where nothing was timed.
    """

    num_leaves: int
    num_merges: int
    num_evaluations: int
    num_block_runs: int
    estimate_s: float | None


class SearchRecord(Record):
    """Result of search (search.json).

    Attributes:
        strategy: Such as "tss".
        noise: Lambda of Environmental Noise Guidance.
        budget: The limits that were set, by name.
        cost: What was announced; None for strategy "uniform".
        num_measured: Configurations measured in this process.
        num_from_journal: Configurations that the journal knew.
        seconds: Wall time of this process.
        network_mse: Of the chosen plan's search weights; None for strategy "uniform".
        nodes: The tree, root first; empty for other strategies than "tss".
        front: Configurations measured at the root.
        branches: Branch shapes chosen and what they were chosen from, by layer.
    """

    strategy: str
    noise: float
    budget: dict[str, float]
    cost: SearchCost | None
    num_measured: int
    num_from_journal: int
    seconds: float
    network_mse: float | None
    nodes: list[SearchNode]
    front: list[SearchPoint]
    branches: dict[str, list[dict[str, Any]]]


class FinetunePoint(Record):
    """One measurement during training.

    Attributes:
        step: Optimizer steps done.
        train_loss: Mean loss since the measurement before; None before the first step.
        held_out_loss: The same loss on held-out inputs.
        held_out_mse: Mean squared error of the network's prediction on them.
    """

    step: int
    train_loss: float | None
    held_out_loss: float
    held_out_mse: float


class FinetuneRecord(Record):
    """Result of finetune (finetune.json); the tensors are in finetuned.safetensors.

    Attributes:
        mode: "peft" or "qat".
        base_tensors_sha256: Digest of the calibrated tensors that they replace.
        tensors_sha256: Digest of finetuned.safetensors.
        num_trained: Trained numbers.
        steps: Optimizer steps done.
        best_step: The step that the tensors are from, which has the least held_out_mse.
        mse_before: Held-out squared error of the calibrated network's prediction.
        mse_after: That of the trained one.
        stopped_early: Whether patience ran out before the last step.
        seconds: Wall time, that of interrupted runs included.
        curve: Measurements, in order; the first is before training.
    """

    mode: str
    base_tensors_sha256: str
    tensors_sha256: str
    num_trained: int
    steps: int
    best_step: int
    mse_before: float
    mse_after: float
    stopped_early: bool
    seconds: float
    curve: list[FinetunePoint]


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
    """Scores for one seed; `baseline` where the recipe asks for one."""

    seed: int
    fp: QualityScores
    quantized: QualityScores
    baseline: QualityScores | None = None


class BaselineQuality(Record):
    """What the budget gives without search and without finetune, fake-quantized in PyTorch.

    Attributes:
        strategy: How its bits were assigned: "uniform".
        weight_bits: Average, weighted by number of weights.
        activation_bits: Likewise.
        scores: Means over the seeds.
        network_mse: As in `QualityRecord`.
    """

    strategy: str
    weight_bits: float
    activation_bits: float
    scores: QualityScores
    network_mse: float


class QualityRecord(Record):
    """Result of evaluate; `fp` and `quantized` are means over the seeds.

    Attributes:
        runner: What produced the quantized images.
        conditioning: Where labels or text embeddings came from; "random" where none were given.
        grids: PNG files relative to the run folder, by "fp", "baseline" and "quantized".
        network_mse: Mean squared error of the quantized network's prediction against full
            precision, on held-out inputs of full-precision trajectories.
        baseline: The baseline's scores; None where the recipe asks for none.
    """

    num_samples: int
    runner: str
    conditioning: str
    seeds: list[SeedQuality]
    fp: QualityScores
    quantized: QualityScores
    grids: dict[str, str]
    gates: list[GateResult]
    network_mse: float | None = None
    baseline: BaselineQuality | None = None


class Spread(Record):
    """One score over the seeds.

    Attributes:
        mean: Mean over the seeds.
        std: Sample standard deviation; None for one seed.
        values: One per seed, in the order of `CompareRecord.seeds`.
    """

    mean: float
    std: float | None
    values: list[float]


class CompareRow(Record):
    """One cell of a comparison; everything is fake-quantized in PyTorch.

    Attributes:
        name: Folder below DIR/cells.
        strategy: How the bits were assigned; of a peer its name.
        variant: "ptq", or how it was trained afterwards: "peft" or "qat".
        peer: Whether another toolkit quantized it.
        description: Of a peer what it does to weights and activations.
        budget: Average bits that the strategy could spend; None for a peer.
        weight_bits: Average of the plan, weighted by number of weights.
        activation_bits: Likewise.
        branch_parameter_fraction: Branch parameters over quantized weights; None for a peer.
        network_mse: As in `QualityRecord`.
        frechet_distance: Over the seeds; None where there is no classifier.
        frechet_ratio: Each seed's distance over full precision's; its mean is that of the means.
        class_accuracy: Over the seeds; None where there is no classifier or there are no labels.
        psnr_db: To full precision with equal seeds.
        seconds: By stage.
        num_evaluations: Configurations that the search measured; None where nothing was searched.
        front: Configurations that the search measured at the root.
    """

    name: str
    strategy: str
    variant: str
    peer: bool
    description: str
    budget: float | None
    weight_bits: float
    activation_bits: float
    branch_parameter_fraction: float | None
    network_mse: float | None
    frechet_distance: Spread | None
    frechet_ratio: Spread | None
    class_accuracy: Spread | None
    psnr_db: Spread | None
    seconds: dict[str, float]
    num_evaluations: int | None
    front: list[SearchPoint]

    @property
    def average_bits(self) -> float:
        """Mean of average weight and average activation bits."""
        return (self.weight_bits + self.activation_bits) / 2


class CompareRecord(Record):
    """Result of compare (compare.json): one row per finished cell.

    Attributes:
        version: The treeq-export that measured it.
        name: Of the recipe.
        checkpoint_sha256: The checkpoint.
        recipe: What all cells share; strategy, budget and finetune mode are each cell's own.
        num_samples: Images for each seed.
        seeds: The seeds.
        conditioning: As in `QualityRecord`.
        fp_frechet_distance: Full precision's, over the seeds.
        fp_class_accuracy: Likewise.
        rows: The finished cells.
        pending: Names of cells that are still to come.
        environment: The machine that the seconds belong to.
    """

    version: str
    name: str
    checkpoint_sha256: str
    recipe: dict[str, Any]
    num_samples: int
    seeds: list[int]
    conditioning: str
    fp_frechet_distance: Spread | None
    fp_class_accuracy: Spread | None
    rows: list[CompareRow]
    pending: list[str]
    environment: dict[str, Any]


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
