"""Records of the stages that make a plan: search.json and finetune.json."""

from typing import Any

from pydantic import Field

from treeq_export.records.base import Record


class SearchPoint(Record):
    """One configuration of the whole network that the search measured.

    Attributes:
        weight_bits: Average weight bits, weighted by number of weights.
        activation_bits: Average activation bits, weighted by number of weights.
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
        name: Part of the network, such as "block 3" or "blocks 0..3"; the layers of a leaf.
        depth: 0 is the root.
        first_leaf: Number of its first leaf.
        last_leaf: Number of its last leaf.
        num_configurations: Number of configurations that the node kept.
        weight_bits: Average weight bits of the chosen plan inside the node.
        activation_bits: Average activation bits of the chosen plan inside the node.
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


class SearchFinalist(Record):
    """A configuration of the whole network among which the last choice was made.

    Attributes:
        weight_bits: Average.
        activation_bits: Average.
        network_mse: On the search's inputs.
        final_mse: On the inputs that finalists are compared on.
        calibrated_mse: There, after calibration; None where that was not measured.
        chosen: Whether this is the plan.
    """

    weight_bits: float
    activation_bits: float
    network_mse: float
    final_mse: float
    calibrated_mse: float | None
    chosen: bool


class SearchRecord(Record):
    """Result of search (search.json).

    Attributes:
        strategy: Search strategy, such as "tss".
        noise: Lambda of Environmental Noise Guidance.
        budget: The limits that were set, by name.
        cost: What was announced; None for other strategies than "tss".
        num_measured: Configurations measured in this process.
        num_from_journal: Configurations that the journal knew.
        seconds: Wall time of this process.
        network_mse: Error of the network with the chosen plan's search weights; None for
            strategy "uniform".
        nodes: The tree, root first; empty for other strategies than "tss".
        front: Configurations measured at the root.
        branches: Branch shapes chosen and what they were chosen from, by layer.
        finalists: What the last choice was made among; empty for other strategies than "tss".
        unused_layers: Layers on which no prediction depends; they are in no plan.
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
    finalists: list[SearchFinalist] = Field(default_factory=list[SearchFinalist])
    unused_layers: list[str] = Field(default_factory=list[str])


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
