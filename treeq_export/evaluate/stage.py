"""Running the evaluation: samples of both sides for every seed, scores, grids, gates."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeq_export.errors import RecipeError
from treeq_export.evaluate.grids import choose_mapping, write_grid
from treeq_export.evaluate.samples import (
    check_finite,
    digest_denoiser,
    digest_quantized,
    digest_tensors,
    make_fingerprint,
    sample_or_load,
)
from treeq_export.evaluate.scores import Judge, open_judge, score
from treeq_export.model.sampler import Run, sample
from treeq_export.model.zoo import Denoiser
from treeq_export.recipe import QualityGates, Recipe
from treeq_export.records import (
    GateResult,
    QualityRecord,
    QualityScores,
    SeedQuality,
    save_record,
)

QUALITY_FILE = "quality.json"
SAMPLES_FOLDER = "samples"
FP = "fp"
QUANTIZED = "quantized"
LABELS = "class_labels"

_REMEDIES = {
    FP: "Check the checkpoint and the sampler section: nothing is quantized here.",
    QUANTIZED: "`treeq-export validate` lists every layer's error; give the worst more bits, "
    "or put them into search.exclude.",
}

Images = dict[str, NDArray[np.float32]]


class Runner(Protocol):
    """What produces the quantized outputs: an entered `OrtRunner` or `TorchRunner`."""

    def run(self, inputs: Mapping[str, Any]) -> NDArray[np.float32]:
        """Return the raw network output for inputs by name."""
        ...


def run_evaluate(
    run: Path,
    denoiser: Denoiser,
    quantized: Runner,
    recipe: Recipe,
    *,
    on_step: Callable[[float], None],
) -> QualityRecord:
    """Sample with both models, score the images, and write `quality.json` and the grids.

    Args:
        run: The run folder, with the files that `recipe.evaluate.runner` stands for.
        denoiser: The full-precision model.
        quantized: The entered runner that `recipe.evaluate.runner` names.
        recipe: Its sampler and evaluate sections.
        on_step: Called with the fraction done, 0..1.

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
    sampler = _Sampler(run, denoiser, quantized, recipe, on_step)
    results: list[SeedQuality] = []
    grids: dict[str, str] = {}
    for seed in section.seeds:
        images, labels = sampler.sample_seed(seed)
        if not grids:
            grids = _write_grids(run, images)
        results.append(
            SeedQuality(
                seed=seed,
                fp=score(judge, images[FP], labels),
                quantized=score(judge, images[QUANTIZED], labels, images[FP]),
            )
        )
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
    )
    save_record(run / QUALITY_FILE, record)
    return record


class _Sampler:
    """Samples of both sides for one seed after the other, from cache where they are there."""

    def __init__(
        self,
        run: Path,
        denoiser: Denoiser,
        quantized: Runner,
        recipe: Recipe,
        on_step: Callable[[float], None],
    ) -> None:
        self.folder = run / SAMPLES_FOLDER
        self.denoiser = denoiser
        self.recipe = recipe
        self.on_step = on_step
        self.num_done = 0

        def run_fp(inputs: dict[str, Tensor]) -> Tensor:
            return denoiser(*(inputs[name] for name in denoiser.input_names))

        def run_quantized(inputs: dict[str, Tensor]) -> Tensor:
            return torch.from_numpy(quantized.run(inputs))

        self.sides: dict[str, tuple[Run, str]] = {
            FP: (run_fp, digest_denoiser(denoiser)),
            QUANTIZED: (run_quantized, digest_quantized(run, recipe.evaluate.runner)),
        }

    def sample_seed(self, seed: int) -> tuple[Images, NDArray[np.int64] | None]:
        """Return the images of both sides, and their labels where the model takes labels."""
        num = self.recipe.evaluate.num_samples
        conditioning = self.denoiser.make_conditioning(num, seed)
        images = {side: self._sample_side(side, seed, conditioning) for side in self.sides}
        labels = conditioning.get(LABELS)
        return images, None if labels is None else labels.numpy()

    def _sample_side(
        self, side: str, seed: int, conditioning: Mapping[str, Tensor]
    ) -> NDArray[np.float32]:
        run, digest = self.sides[side]
        num, section = self.recipe.evaluate.num_samples, self.recipe.sampler
        runner = "torch (full precision)" if side == FP else self.recipe.evaluate.runner
        fingerprint = make_fingerprint(
            runner=runner,
            source=digest,
            sampler=section.model_dump(mode="json"),
            num=num,
            seed=seed,
            conditioning=digest_tensors(conditioning),
        )
        share = num * section.steps
        total = share * len(self.sides) * len(self.recipe.evaluate.seeds)
        before = self.num_done

        def make() -> Tensor:
            return sample(
                run,
                self.denoiser,
                section,
                num=num,
                seed=seed,
                conditioning=conditioning,
                on_step=lambda done: self.on_step((before + done) / total),
            )

        path = self.folder / f"{side}_seed{seed}.safetensors"
        samples = sample_or_load(path, fingerprint, make)
        self.num_done = before + share
        self.on_step(self.num_done / total)
        check_finite(samples, f"{runner}, seed {seed}", _REMEDIES[side])
        return samples


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
    names = {side: f"{SAMPLES_FOLDER}/{side}.png" for side in images}
    for side, name in names.items():
        write_grid(run / name, images[side], mapping)
    return names
