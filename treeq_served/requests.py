"""Requests of the sampler: read, checked, and regrouped by what can be sampled together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from treeq_served.settings import SamplerSettings

if TYPE_CHECKING:
    from triton_python_backend_utils import InferenceResponseSender

MOST_STEPS = 1000
LABEL_INPUT = "class_labels"
_CONTROLS = ("steps", "guidance", "preview_every")


class RefusedError(ValueError):
    """A request cannot be served as it is; the message says why."""


class CancelledError(Exception):
    """Nobody waits for the answer any more."""


@dataclass
class Job:
    """A request that has been read.

    Attributes:
        sender: The receiver of the responses.
        outputs: Names of the outputs that were asked for.
        seeds: A seed for each row.
        steps: (n,) int32.
        guidance: (n,) float32.
        conditioning: The denoiser's conditioning inputs with n rows.
        preview_every: Steps between previews; 0 is none.
        latents: (n, *sample_shape) float32, filled while it is sampled.
        error: Why it cannot be answered.
    """

    sender: "InferenceResponseSender"
    outputs: tuple[str, ...]
    seeds: list[int]
    steps: NDArray[np.int32]
    guidance: NDArray[np.float32]
    conditioning: dict[str, NDArray[Any]]
    preview_every: int
    latents: NDArray[np.float32]
    error: Exception | None = None


@dataclass(frozen=True)
class Group:
    """Rows of one or several jobs that are sampled as one batch.

    Attributes:
        steps: Number of steps of all rows.
        guidance: Guidance of all rows.
        rows: Job and row in it of each row.
    """

    steps: int
    guidance: float
    rows: list[tuple[Job, int]]

    @property
    def conditioning(self) -> dict[str, NDArray[Any]]:
        """Conditioning inputs, with all rows."""
        names = self.rows[0][0].conditioning
        return {
            name: np.stack([job.conditioning[name][i] for job, i in self.rows]) for name in names
        }


def read_job(
    arrays: Mapping[str, NDArray[Any]],
    outputs: tuple[str, ...],
    sender: "InferenceResponseSender",
    settings: SamplerSettings,
) -> Job:
    """Read a request.

    Args:
        arrays: The request's inputs by name, with a leading batch axis.
        outputs: Names of the outputs that were asked for.
        sender: The receiver of the responses.
        settings: Defaults and limits.

    Raises:
        RefusedError: An input is missing, has another number of rows or type, or is out of range.
    """
    num = _count_rows(arrays, settings)
    seeds = arrays["seed"].reshape(-1)
    _check_range("seed", seeds, 0, np.iinfo(np.int64).max)
    steps = _column(arrays, "steps", num, settings.steps, np.int32)
    _check_range("steps", steps, 1, MOST_STEPS)
    embedded = settings.embedded_guidance
    default, least = (settings.guidance_scale, 1.0) if embedded is None else (embedded, 0.0)
    guidance = _column(arrays, "guidance", num, default, np.float32)
    wrong = ~np.isfinite(guidance) | (guidance < least)
    if wrong.any():
        raise RefusedError(
            f"guidance: received {guidance[wrong][0]}, expected a finite number >= {least:g}."
        )
    preview_every = int(_column(arrays, "preview_every", num, 0, np.int32)[0])
    if preview_every < 0:
        raise RefusedError(f"preview_every: received {preview_every}, expected 0 (none) or more.")
    if preview_every and len({*zip(steps.tolist(), guidance.tolist(), strict=True)}) > 1:
        raise RefusedError("preview_every: rows of one request need equal steps and guidance.")
    return Job(
        sender=sender,
        outputs=outputs,
        seeds=[int(seed) for seed in seeds],
        steps=steps,
        guidance=guidance,
        conditioning=_read_conditioning(arrays, settings),
        preview_every=preview_every,
        latents=np.empty((num, *settings.sample_shape), np.float32),
    )


def _count_rows(arrays: Mapping[str, NDArray[Any]], settings: SamplerSettings) -> int:
    """Return the number of rows, which all inputs have; the server may not have checked it."""
    text = settings.num_classes is None
    for name in ("seed", *(settings.conditioning if text else ("label",))):
        if name not in arrays:
            raise RefusedError(f"{name}: received none, expected a row for each image.")
    num = arrays["seed"].size
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise RefusedError(f"{name}: received type {array.dtype}, expected numbers.")
        one = name in ("seed", "label", *_CONTROLS)
        if array.ndim < 1 or len(array) != num or not num or (one and array.size != num):
            raise RefusedError(
                f"{name}: received shape {array.shape}, expected {max(num, 1)} rows."
            )
    return num


def _column(
    arrays: Mapping[str, NDArray[Any]], name: str, num: int, default: float, kind: Any
) -> NDArray[Any]:
    """Return an optional input as (n,)."""
    if name not in arrays:
        return np.full(num, default, kind)
    return arrays[name].reshape(-1).astype(kind, copy=False)


def _read_conditioning(
    arrays: Mapping[str, NDArray[Any]], settings: SamplerSettings
) -> dict[str, NDArray[Any]]:
    if settings.num_classes is not None:
        labels = arrays["label"].reshape(-1).astype(np.int64)
        _check_range("label", labels, 0, settings.num_classes - 1)
        return {LABEL_INPUT: labels}
    for name, shape in settings.conditioning.items():
        found = arrays[name].shape[1:]
        wanted = tuple(size if axis == -1 else axis for axis, size in zip(shape, found))  # noqa: B905
        if len(shape) != len(found) or found != wanted:
            raise RefusedError(f"{name}: received rows of shape {found}, expected {shape}.")
        if not np.isfinite(arrays[name]).all():
            raise RefusedError(f"{name}: holds NaN or infinity. Encode the prompt again.")
    return {name: np.array(arrays[name], np.float32) for name in settings.conditioning}


def _check_range(name: str, values: NDArray[Any], low: int, high: int) -> None:
    wrong = (values < low) | (values > high)
    if wrong.any():
        raise RefusedError(f"{name}: received {values[wrong][0]}, expected {low}..{high}.")


def group_rows(jobs: Sequence[Job]) -> list[Group]:
    """Return the rows of all jobs, those with equal steps, guidance and shapes together."""
    found: dict[tuple[int, float, tuple[Any, ...]], list[tuple[Job, int]]] = {}
    for job in jobs:
        shapes = tuple(rows.shape[1:] for rows in job.conditioning.values())
        for row in range(len(job.seeds)):
            key = int(job.steps[row]), float(job.guidance[row]), shapes
            found.setdefault(key, []).append((job, row))
    return [Group(steps, guidance, rows) for (steps, guidance, _), rows in found.items()]
