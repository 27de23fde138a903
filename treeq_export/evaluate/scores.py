"""Scores of images: a classifier's accuracy, Frechet distance to real images, paired PSNR.

The classifier is an ONNX file, images -> logits, features; the reference is a safetensors file with
mean and covariance of the features of real images. Both come with the recipe.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from treeq_export.errors import RecipeError
from treeq_export.evaluate.frechet import Gaussian, fit_gaussian, frechet_distance
from treeq_export.quant.metrics import psnr_db
from treeq_export.reading import load_safetensors
from treeq_export.recipe import EvaluateSection
from treeq_export.records import QualityScores
from treeq_served.denoise import is_pixels

BATCH_SIZE = 256
_OUTPUTS = ["logits", "features"]
_TENSORS = {"mean", "covariance"}
_PIXEL_RANGE = 2.0  # images are in [-1, 1]


@dataclass(frozen=True)
class Judge:
    """What images are scored with.

    Attributes:
        session: The classifier; None where the recipe has none.
        reference: Features of real images; None where the recipe has none.
    """

    session: onnxruntime.InferenceSession | None = None
    reference: Gaussian | None = None


def open_judge(section: EvaluateSection, sample_shape: tuple[int, ...]) -> Judge:
    """Load classifier and reference and check them against each other and the model.

    Args:
        section: Paths of both; None skips what needs the file.
        sample_shape: Shape of one sample, without batch.

    Raises:
        RecipeError: A file is missing or malformed, or does not fit the samples.
    """
    if section.classifier is None:
        if section.reference is not None:
            raise RecipeError(
                "evaluate.reference: needs evaluate.classifier, whose features it describes. "
                "Add the classifier or remove the reference."
            )
        return Judge()
    session, num_features = _open_classifier(Path(section.classifier), sample_shape)
    if section.reference is None:
        return Judge(session)
    return Judge(session, _load_reference(Path(section.reference), num_features))


def _open_classifier(
    path: Path, sample_shape: tuple[int, ...]
) -> tuple[onnxruntime.InferenceSession, int]:
    """Return the session and its number of features."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    if not path.is_file():
        raise RecipeError(
            f"{path}: missing. Set evaluate.classifier to an ONNX file, or remove it."
        )
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no other common base
        reason = " ".join(str(error).split())
        raise RecipeError(
            f"{path}: is no ONNX model that can be loaded ({reason:.120}). "
            "Set evaluate.classifier to a classifier, images -> logits, features."
        ) from error
    inputs = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]
    if inputs != ["images"] or not set(outputs) >= set(_OUTPUTS):
        raise RecipeError(
            f"{path}: received {', '.join(inputs)} -> {', '.join(outputs)}, expected images -> "
            "logits, features. Export the classifier with these names."
        )
    return session, _count_features(path, session, sample_shape)


def _count_features(
    path: Path, session: onnxruntime.InferenceSession, sample_shape: tuple[int, ...]
) -> int:
    """Run the classifier on one and on two samples; return the number of features."""
    shape = f"(n, {', '.join(map(str, sample_shape))})"
    remedy = "Use a classifier of this model's samples, or remove evaluate.classifier."
    received = ()
    for num in (1, 2):
        try:
            _, features = _classify(session, np.zeros((num, *sample_shape), dtype=np.float32))
        except Exception as error:  # as above
            reason = " ".join(str(error).split())
            raise RecipeError(
                f"{path}: cannot take images of shape {shape}, float32, for any n "
                f"({reason:.200}). {remedy}"
            ) from error
        received = features.shape
    if len(received) != 2:
        raise RecipeError(f"{path}: features: received shape {received}, expected (n, d). {remedy}")
    return received[1]


def _load_reference(path: Path, num_features: int) -> Gaussian:
    remedy = "Write mean and covariance of the classifier's features of real images."
    tensors = load_safetensors(path, error=RecipeError, remedy="Correct evaluate.reference.")
    if not set(tensors) >= _TENSORS:
        raise RecipeError(
            f"{path}: received tensors {', '.join(sorted(tensors)) or 'none'}, expected "
            f"mean, covariance. {remedy}"
        )
    mean, covariance = tensors["mean"], tensors["covariance"]
    expected = ((num_features,), (num_features, num_features))
    if (mean.shape, covariance.shape) != expected:
        raise RecipeError(
            f"{path}: received mean {mean.shape} and covariance {covariance.shape}, expected "
            f"{expected[0]} and {expected[1]} for the classifier's features. {remedy}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise RecipeError(f"{path}: holds NaN or infinity. {remedy}")
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))


def score(
    judge: Judge,
    images: NDArray[np.float32],
    labels: NDArray[np.int64] | None,
    full_precision: NDArray[np.float32] | None = None,
) -> QualityScores:
    """Score one set of images.

    Args:
        judge: Classifier and reference.
        images: (n, *sample_shape) float32, finite, as sampled. Pixels are clipped to [-1, 1], as
            they are where an image is stored or shown; latents are not.
        labels: (n,) the classes they were conditioned on; None leaves class_accuracy out.
        full_precision: The same from full precision with equal noise and conditioning; None
            leaves psnr_db out.

    Returns:
        The scores. PSNR is that of the whole set, from one mean squared error: the mean of single
        images' values would be ruled by the few that hardly changed. Its range is 2 for images;
        for latents it is the extent of the full-precision ones.

    Raises:
        RecipeError: The classifier knows fewer classes than there are labels.
    """
    extent = _PIXEL_RANGE
    if is_pixels(images.shape[1:]):
        images = images.clip(-1.0, 1.0)
        full_precision = None if full_precision is None else full_precision.clip(-1.0, 1.0)
    elif full_precision is not None:
        extent = float(np.ptp(full_precision))
    distance = accuracy = psnr = None
    if judge.session is not None:
        logits, features = _classify(judge.session, images)
        if labels is not None:
            accuracy = _class_accuracy(logits, labels)
        if judge.reference is not None:
            distance = frechet_distance(fit_gaussian(features), judge.reference)
    if full_precision is not None:
        psnr = psnr_db(full_precision, images, extent)
    return QualityScores(frechet_distance=distance, class_accuracy=accuracy, psnr_db=psnr)


def _classify(
    session: onnxruntime.InferenceSession, images: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    batches = [
        session.run(_OUTPUTS, {"images": images[start : start + BATCH_SIZE]})
        for start in range(0, len(images), BATCH_SIZE)
    ]
    logits, features = zip(*batches, strict=True)
    return np.concatenate(logits), np.concatenate(features)


def _class_accuracy(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    num_classes = logits.shape[1]
    if labels.max() >= num_classes:
        raise RecipeError(
            f"evaluate.classifier: received logits of {num_classes} classes, expected more than "
            f"the largest label {labels.max()}. Use a classifier of this model's classes."
        )
    return float((logits.argmax(axis=1) == labels).mean())
