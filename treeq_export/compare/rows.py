"""From a finished run folder to a row of the table."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from treeq_export.pipeline.workspace import Workspace
from treeq_export.records import (
    QualityRecord,
    QualityScores,
    SearchRecord,
    Spread,
    load_record,
)
from treeq_export.run_folder import RunFolder


def make_spread(values: Sequence[float | None]) -> Spread | None:
    """Return mean and sample standard deviation; None where a seed has no value.

    >>> make_spread([1.0, 2.0, 3.0]).std
    1.0
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    mean = sum(known) / len(known)
    std = statistics.stdev(known) if len(known) > 1 and math.isfinite(mean) else None
    return Spread(mean=mean, std=std, values=known)


def make_ratio(values: Spread | None, base: Spread | None) -> Spread | None:
    """Return one spread over another: each seed's ratio, and the ratio of the two means.

    The mean is that of the means, because a seed whose base is small by chance would rule the
    mean of the ratios.
    """
    if values is None or base is None or not all(base.values):
        return None
    ratios = make_spread([v / b for v, b in zip(values.values, base.values, strict=True)])
    return ratios and ratios.model_copy(update={"mean": values.mean / base.mean})


def spread_of(scores: Sequence[QualityScores], name: str) -> Spread | None:
    """Return the spread of one score over the seeds."""
    return make_spread([getattr(entry, name) for entry in scores])


def read_quality(workspace: Workspace) -> QualityRecord:
    """Read a cell's quality.json.

    Raises:
        PlanError: Missing or malformed.
    """
    return load_record(workspace.run / RunFolder.QUALITY, QualityRecord, "evaluate")


def count_evaluations(search: SearchRecord | None) -> int | None:
    """Return how many configurations a search measured; None where it measured nothing."""
    number = 0 if search is None else search.num_measured + search.num_from_journal
    return number or None


def score_fields(quality: QualityRecord) -> dict[str, Any]:
    """Return the fields of a row that come from the images."""
    scores, fp = ([s.quantized for s in quality.seeds], [s.fp for s in quality.seeds])
    distance = spread_of(scores, "frechet_distance")
    return {
        "network_mse": quality.network_mse,
        "frechet_distance": distance,
        "frechet_ratio": make_ratio(distance, spread_of(fp, "frechet_distance")),
        "class_accuracy": spread_of(scores, "class_accuracy"),
        "psnr_db": spread_of(scores, "psnr_db"),
    }
