"""Record of image quality: quality.json."""

from treeq_export.records.base import GateResult, Record


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
        activation_bits: Average activation bits.
        scores: Means over the seeds.
        network_mse: Same as `QualityRecord.network_mse`.
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
        conditioning: Source of labels or text embeddings; "random" if none were given.
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
