"""Record of a comparison: compare.json."""

from typing import Any

from treeq_export.records.base import Record, SealedRecord
from treeq_export.records.plans import SearchPoint


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
        description: For a peer, what it does to weights and activations.
        budget: Average bits that the strategy could spend; None for a peer.
        weight_bits: Average of the plan, weighted by number of weights.
        activation_bits: Average activation bits.
        branch_parameter_fraction: Branch parameters over quantized weights; None for a peer.
        network_mse: Same as `QualityRecord.network_mse`.
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


class CompareRecord(SealedRecord):
    """Result of compare (compare.json): one row per finished cell.

    Attributes:
        version: The treeq-export that measured it.
        name: Name of the recipe.
        checkpoint_sha256: The checkpoint.
        recipe: What all cells share; strategy, budget and finetune mode are each cell's own.
        num_samples: Images for each seed.
        seeds: The seeds.
        conditioning: Same as `QualityRecord.conditioning`.
        fp_frechet_distance: Full precision's, over the seeds.
        fp_class_accuracy: Class accuracy of full precision.
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
