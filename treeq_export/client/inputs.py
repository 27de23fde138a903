"""The inputs of a request to the sampler, and their checks."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeq_export.client.answers import MAX_TENSOR_BYTES
from treeq_export.client.connection import Arrays, refused
from treeq_export.client.sampler import MAX_INT32, SamplerInfo
from treeq_export.errors import ServeError
from treeq_export.reading import load_safetensors

_MAX_SEED = np.iinfo(np.int64).max


def make_inputs(
    info: SamplerInfo,
    *,
    label: int | Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
    steps: int | None = None,
    guidance: float | None = None,
    conditioning: Arrays | None = None,
    preview_every: int | None = None,
) -> dict[str, NDArray[Any]]:
    """Return the inputs of one request.

    Args:
        info: The sampler.
        label: A class for all images, or one each; None of text models.
        seed: The seed of one image, or one each.
        steps: Solver steps; None leaves it to the server.
        guidance: Guidance scale; None leaves it to the server.
        conditioning: Text inputs, one row for all images or one each; None of class models.
        preview_every: Steps between previews, of a decoupled sampler; None is no previews.

    Returns:
        Input name to array with a leading batch axis.

    Raises:
        ServeError: A value out of range, one too many or missing; kind "refused".
    """
    seeds = [seed] if isinstance(seed, int) else list(seed)
    _check_all("seed", seeds, 0, _MAX_SEED, "")
    num = len(seeds)
    if not 1 <= num <= info.max_batch:
        raise refused(
            f"images: received {num}, expected 1..{info.max_batch} in one request. "
            "Send several requests."
        )
    inputs: dict[str, NDArray[Any]] = _conditioning(info, label, conditioning, num)
    inputs["seed"] = np.array(seeds, np.int64)[:, None]
    if steps is not None:
        _check_all("steps", [steps], 1, MAX_INT32, "")
        inputs["steps"] = np.full((num, 1), steps, np.int32)
    if guidance is not None:
        # Distilled text models take guidance as an input of the network, which may be below 1.
        least = 0.0 if info.text_inputs else 1.0
        if not (math.isfinite(guidance) and guidance >= least):
            raise refused(
                f"guidance: received {guidance:g}, expected a finite number >= {least:g}; "
                f"the server's default is {info.guidance:g}."
            )
        inputs["guidance"] = np.full((num, 1), guidance, np.float32)
    if preview_every:
        _check_all("preview_every", [preview_every], 0, MAX_INT32, "")
        if not info.decoupled:
            raise refused(
                f"preview_every: {info.name} does not stream. Write its repository with "
                "`treeq-export serve --decoupled`, or leave --preview-every out."
            )
        inputs["preview_every"] = np.full((num, 1), preview_every, np.int32)
    for name in inputs:
        if name not in info.inputs:
            raise refused(f"{name}: {info.name} has no such input. Leave it out.")
    return inputs


def _check_all(name: str, values: Sequence[int], low: int, high: int, hint: str) -> None:
    for value in values:
        if not low <= value <= high:
            wanted = f"{low} or more" if high in (_MAX_SEED, MAX_INT32) else f"{low}..{high}"
            raise refused(f"{name}: received {value}, expected {wanted}.{hint}")


def _conditioning(
    info: SamplerInfo, label: int | Sequence[int] | None, conditioning: Arrays | None, num: int
) -> dict[str, NDArray[Any]]:
    """Return the label, or the text inputs, with `num` rows."""
    if info.num_classes is not None:
        if label is None or conditioning is not None:
            raise refused(
                f"label: {info.model} is class-conditional. Give --label "
                f"0..{info.num_classes - 1}, and no conditioning."
            )
        labels = [label] * num if isinstance(label, int) else list(label)
        hint = f" {info.model} has {info.num_classes} classes."
        _check_all("label", labels, 0, info.num_classes - 1, hint)
        if len(labels) != num:
            raise refused(f"label: received {len(labels)} labels, expected one or {num}.")
        return {"label": np.array(labels, np.int32)[:, None]}
    if label is not None or conditioning is None:
        raise refused(
            f"conditioning: {info.model} is a text model. Give --conditioning FILE with "
            f"{', '.join(info.text_inputs)}, and no label."
        )
    _check_rows(info, conditioning, "conditioning")
    return {
        name: np.broadcast_to(rows, (num, *rows.shape[1:])).astype(np.float32)
        for name, rows in conditioning.items()
    }


def _check_rows(info: SamplerInfo, rows: Arrays, where: str) -> None:
    """Check names, shapes and finiteness of text inputs; an axis of -1 has any size."""
    wanted = info.text_inputs
    if set(rows) != set(wanted):
        raise refused(
            f"{where}: received {', '.join(sorted(rows)) or 'nothing'}, expected "
            f"{', '.join(wanted)}. Name the tensors like the model's inputs."
        )
    for name, shape in wanted.items():
        found = rows[name].shape[1:]
        fits = len(found) == len(shape) and all(
            size in (-1, axis) for size, axis in zip(shape, found, strict=True)
        )
        if not fits or len(rows[name]) == 0:
            axes = ", ".join(map(str, shape))
            raise refused(
                f"{where}: {name}: received shape {rows[name].shape}, expected (prompts, {axes}). "
                "Encode the prompts for this model."
            )
        if not np.isfinite(rows[name].astype(np.float32)).all():
            raise refused(f"{where}: {name}: holds NaN or infinity. Encode the prompts again.")


def load_conditioning(path: Path, info: SamplerInfo) -> dict[str, NDArray[np.float32]]:
    """Read a conditioning file: safetensors, a tensor per text input, one row per prompt.

    Args:
        path: The file.
        info: The sampler it is for.

    Returns:
        Input name to (prompts, *row shape) float32.

    Raises:
        ServeError: Unreadable, or not this model's inputs.
    """
    import ml_dtypes  # noqa: F401  # numpy learns bfloat16 from it

    inputs = ", ".join(info.text_inputs) or "the text inputs of a text model"
    try:
        tensors = load_safetensors(
            path, error=ServeError, remedy=f"Give a safetensors file with {inputs}."
        )
    except ServeError as error:
        raise refused(str(error)) from error
    _check_rows(info, tensors, str(path))
    if len({len(rows) for rows in tensors.values()}) != 1:
        raise refused(
            f"{path}: its tensors have different numbers of prompts, expected one row per prompt."
        )
    return {name: rows.astype(np.float32) for name, rows in tensors.items()}


def pick_prompt(prompts: Arrays, index: int) -> dict[str, NDArray[Any]]:
    """Return one prompt's row of every text input, with a batch axis of 1.

    Raises:
        ServeError: There is no such prompt.
    """
    num = len(next(iter(prompts.values())))
    _check_all("prompt", [index], 0, num - 1, f" The file holds {num}.")
    return {name: rows[index : index + 1] for name, rows in prompts.items()}


def zero_conditioning(info: SamplerInfo) -> dict[str, NDArray[np.float32]] | None:
    """Return text inputs of zeros for one image; None of class-conditional models.

    Raises:
        ServeError: The model's configuration asks for too many.
    """
    if info.num_classes is not None:
        return None
    return {
        name: zeros(name, (1, *shape), np.dtype(np.float32))
        for name, shape in info.text_inputs.items()
    }


def zeros(name: str, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return zeros for an input.

    Args:
        name: The input.
        shape: Shape in the model's configuration; an axis of any size (-1) gets 1.
        dtype: Type of the input.

    Raises:
        ServeError: They are more than a request may hold; kind "failed".
    """
    sizes = [max(size, 1) for size in shape]
    if dtype.itemsize * math.prod(sizes) > MAX_TENSOR_BYTES:
        raise ServeError(
            f"{name}: the model's configuration says shape {tuple(sizes)}, expected at most "
            f"{MAX_TENSOR_BYTES} bytes. Another server?",
            kind="failed",
        )
    return np.zeros(sizes, dtype)
