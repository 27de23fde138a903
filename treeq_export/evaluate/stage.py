"""Running the evaluation: samples of all sides for every seed, scores, grids, gates."""

import math
from dataclasses import dataclass
from pathlib import Path

from treeq_export.errors import RecipeError
from treeq_export.evaluate.grids import choose_mapping, write_grid
from treeq_export.evaluate.network import collect_held_out
from treeq_export.evaluate.samples import digest_quantized
from treeq_export.evaluate.sampling import (
    BASELINE,
    FP,
    LABELS,
    QUANTIZED,
    Images,
    Side,
    full_precision_side,
    sample_seeds,
)
from treeq_export.evaluate.scores import Judge, open_judge, score
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import Plan
from treeq_export.progress import OnStep, Say, say_nothing
from treeq_export.recipe import QualityGates, Recipe
from treeq_export.records import (
    BaselineQuality,
    GateResult,
    QualityRecord,
    QualityScores,
    SeedQuality,
    save_record,
)
from treeq_export.run_folder import RunFolder
from treeq_export.runners.protocols import Runner

_SAMPLING_SHARE = 0.97  # of the work; the rest is the network's error on held-out inputs


@dataclass(frozen=True)
class Baseline:
    """A second quantized model, fake-quantized in PyTorch.

    Attributes:
        plan: The plan of that model.
        runner: An entered `TorchRunner`.
        source: Digest of its files (`digest_quantized`).
    """

    plan: Plan
    runner: Runner
    source: str


def run_evaluate(
    run: Path,
    denoiser: Denoiser,
    quantized: Runner,
    recipe: Recipe,
    *,
    on_step: OnStep,
    baseline: Baseline | None = None,
    fp_samples: Path | None = None,
    source: str | None = None,
    say: Say = say_nothing,
) -> QualityRecord:
    """Sample with all models, score the images, and write `quality.json` and the grids.

    Args:
        run: The run folder, with the files that `recipe.evaluate.runner` stands for.
        denoiser: The full-precision model.
        quantized: The entered runner that `recipe.evaluate.runner` names.
        recipe: The recipe; its sampler and evaluate sections count.
        on_step: Called with the fraction done, 0..1.
        baseline: A second quantized model to measure beside the first.
        fp_samples: Folder of the cached full-precision samples; None is that of the run.
        source: Digest of the quantized model; None takes that of the run folder's files.
        say: Told in one line that cached samples are damaged.

    Returns:
        The record; its gates may be unmet, which the caller decides on.

    Raises:
        RecipeError: Classifier or reference do not fit, or a gate needs one that is not there.
        PlanError: The quantized model's files are missing.
        TreeqError: Some images are not finite.
        OutputError: The folder cannot be written to.
    """
    section = recipe.evaluate
    judge = open_judge(section, denoiser.sample_shape)
    check_gates(section.gates, judge, has_labels=LABELS in denoiser.input_names)
    folder = run / RunFolder.SAMPLES
    source = source or digest_quantized(run, section.runner)
    sides = {
        FP: full_precision_side(denoiser, fp_samples or folder),
        QUANTIZED: Side(quantized, source, section.runner, folder),
    }
    if baseline is not None:
        sides[BASELINE] = Side(baseline.runner, baseline.source, "torch", folder)
    results: list[SeedQuality] = []
    grids: dict[str, str] = {}
    for seed, images, labels in sample_seeds(
        denoiser, recipe, sides, lambda done: on_step(_SAMPLING_SHARE * done), say
    ):
        grids = grids or _write_grids(run, images)  # of the first seed
        scores = {
            name: score(judge, images[name], labels, None if name == FP else images[FP])
            for name in images
        }
        results.append(SeedQuality(seed=seed, **scores))
    held_out = collect_held_out(denoiser, recipe)
    fp = mean_scores([result.fp for result in results])
    quantized_mean = mean_scores([result.quantized for result in results])
    record = QualityRecord(
        num_samples=section.num_samples,
        runner=section.runner,
        conditioning=denoiser.conditioning_source,
        seeds=results,
        fp=fp,
        quantized=quantized_mean,
        grids=grids,
        gates=apply_gates(section.gates, fp, quantized_mean),
        network_mse=held_out.measure_mse(quantized),
        baseline=None
        if baseline is None
        else BaselineQuality(
            strategy=baseline.plan.strategy.name,
            weight_bits=baseline.plan.average_weight_bits,
            activation_bits=baseline.plan.average_activation_bits,
            scores=mean_scores([result.baseline for result in results if result.baseline]),
            network_mse=held_out.measure_mse(baseline.runner),
        ),
    )
    on_step(1.0)
    save_record(run / RunFolder.QUALITY, record)
    return record


def check_gates(gates: QualityGates, judge: Judge, *, has_labels: bool) -> None:
    """Check, before anything is sampled, that every gate can be measured.

    Raises:
        RecipeError: One cannot.
    """
    if gates.max_frechet_ratio is not None and judge.reference is None:
        raise RecipeError(
            "evaluate.gates.max_frechet_ratio: needs evaluate.classifier and evaluate.reference. "
            "Add them or remove the gate."
        )
    if gates.min_class_accuracy is not None and judge.session is None:
        raise RecipeError(
            "evaluate.gates.min_class_accuracy: needs evaluate.classifier. "
            "Add it or remove the gate."
        )
    if gates.min_class_accuracy is not None and not has_labels:
        raise RecipeError(
            "evaluate.gates.min_class_accuracy: this model is not conditioned on class labels. "
            "Remove the gate."
        )


def apply_gates(
    gates: QualityGates, fp: QualityScores, quantized: QualityScores
) -> list[GateResult]:
    """Return the result of every gate that the recipe sets.

    Args:
        gates: The limits.
        fp: Mean scores of full precision.
        quantized: Mean scores of the quantized model.
    """
    results: list[GateResult] = []
    if gates.max_frechet_ratio is not None:
        ratio = _ratio(quantized.frechet_distance, fp.frechet_distance)
        results.append(
            GateResult.of("frechet_distance ratio", ratio, gates.max_frechet_ratio, at_least=False)
        )
    if gates.min_class_accuracy is not None:
        accuracy = _or_nan(quantized.class_accuracy)
        results.append(
            GateResult.of("class_accuracy", accuracy, gates.min_class_accuracy, at_least=True)
        )
    if gates.min_psnr_db is not None:
        psnr = _or_nan(quantized.psnr_db)
        results.append(GateResult.of("psnr_db", psnr, gates.min_psnr_db, at_least=True))
    return results


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _ratio(value: float | None, base: float | None) -> float:
    """Return value / base; nan where one is missing, which passes no gate."""
    value, base = _or_nan(value), _or_nan(base)
    if base == 0.0:
        return 1.0 if value == 0.0 else math.inf
    return value / base


def mean_scores(scores: list[QualityScores]) -> QualityScores:
    """Return the mean of every score over the seeds; None where a seed has none."""

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if len(known) == len(values) else None

    return QualityScores(
        frechet_distance=mean([entry.frechet_distance for entry in scores]),
        class_accuracy=mean([entry.class_accuracy for entry in scores]),
        psnr_db=mean([entry.psnr_db for entry in scores]),
    )


def _write_grids(run: Path, images: Images) -> dict[str, str]:
    mapping = choose_mapping(images[FP])
    names = {side: RunFolder.sample_grid(side) for side in images}
    for side, name in names.items():
        write_grid(run / name, images[side], mapping)
    return names
