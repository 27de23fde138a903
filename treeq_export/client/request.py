"""Requests of the sampler: what the server's model takes, inputs, checks, and what comes back."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeq_export.client.answers import MAX_TENSOR_BYTES, TensorConfig, clean
from treeq_export.client.connection import Arrays, Connection
from treeq_export.errors import ServeError
from treeq_export.reading import load_safetensors

SAMPLER = "sampler"
CONTROLS = ("label", "seed", "steps", "guidance", "preview_every")  # all else is conditioning
_MAX_SEED = np.iinfo(np.int64).max
_MAX_INT32 = np.iinfo(np.int32).max
_MAX_NAME = 200  # characters of what a server calls its models
_OUTPUTS = {"image": np.uint8, "latents": np.float32, "step": np.int32}  # in every repository


@dataclass(frozen=True)
class SamplerInfo:
    """What a server's sampler is, from its configuration.

    Attributes:
        name: The model's name on the server.
        version: The version that is ready; "" if the server does not say.
        model: Name of what was exported.
        mode: "inprocess" or "bls".
        target: Compiled target that runs.
        num_classes: Labels are 0..num_classes-1; None of text models.
        steps: Default of the server.
        guidance: Likewise.
        max_batch: Most images in one request.
        decoupled: Whether it answers by a stream, gRPC only.
        inputs: Shape of one row of every input.
        outputs: Shape of one row of every output.
    """

    name: str
    version: str
    model: str
    mode: str
    target: str
    num_classes: int | None
    steps: int
    guidance: float
    max_batch: int
    decoupled: bool
    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]

    @property
    def text_inputs(self) -> dict[str, tuple[int, ...]]:
        """Shape of one row of every text input; none of class-conditional models."""
        return {name: shape for name, shape in self.inputs.items() if name not in CONTROLS}

    @property
    def has_image(self) -> bool:
        """Whether it gives pictures, not the raw sample alone."""
        return "image" in self.outputs


def read_info(connection: Connection, model: str = SAMPLER) -> SamplerInfo:
    """Ask the server what its sampler is.

    Args:
        connection: To the server.
        model: The sampler's name.

    Raises:
        ServeError: The server cannot be asked, or the model is no sampler of treeq-export.
    """
    config = connection.model_config(model)
    given = {
        key.removeprefix("treeq_"): value.get("string_value", "")
        for key, value in config.get("parameters", {}).items()
    }
    try:
        inputs, outputs = _shapes(config.get("input", [])), _shapes(config.get("output", []))
        classes = given.get("num_classes")
        if outputs["step"] != (1,):
            raise ValueError("another shape of step")  # noqa: TRY301
        return SamplerInfo(
            name=model,
            version=clean(_ready_version(connection, model), _MAX_NAME),
            model=clean(given["model"], _MAX_NAME),
            mode=clean(given["mode"], _MAX_NAME),
            target=clean(given["target"], _MAX_NAME),
            num_classes=None if classes is None else _read_count(classes),
            steps=_read_count(given["steps"]),
            guidance=_read_finite(given["guidance"]),
            max_batch=min(max(config.get("max_batch_size", 0), 1), _most_rows(outputs)),
            decoupled=config.get("model_transaction_policy", {}).get("decoupled", False),
            inputs=inputs,
            outputs=outputs,
        )
    except (KeyError, ValueError) as error:
        raise _refused(
            f"{connection.url}: {model}: no sampler of treeq-export (its configuration has no "
            "treeq_* parameters). Name the sampler's model with --model."
        ) from error


def _read_count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= _MAX_INT32:
        raise ValueError("out of range")
    return number


def _read_finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def _shapes(tensors: Sequence[TensorConfig]) -> dict[str, tuple[int, ...]]:
    return {tensor["name"]: tuple(tensor["dims"]) for tensor in tensors}


def _most_rows(outputs: Mapping[str, tuple[int, ...]]) -> int:
    """Return how many rows of all outputs fit into an answer, 1 at least."""
    row_bytes = sum(
        np.dtype(_OUTPUTS[name]).itemsize * math.prod(max(size, 1) for size in shape)
        for name, shape in outputs.items()
        if name in _OUTPUTS
    )
    return max(MAX_TENSOR_BYTES // max(row_bytes, 1), 1)


def _ready_version(connection: Connection, model: str) -> str:
    ready = [
        entry.get("version", "")
        for entry in connection.models()
        if entry["name"] == model and entry.get("state") == "READY"
    ]
    return ready[-1] if ready else ""


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
        raise _refused(
            f"images: received {num}, expected 1..{info.max_batch} in one request. "
            "Send several requests."
        )
    inputs: dict[str, NDArray[Any]] = _conditioning(info, label, conditioning, num)
    inputs["seed"] = np.array(seeds, np.int64)[:, None]
    if steps is not None:
        _check_all("steps", [steps], 1, _MAX_INT32, "")
        inputs["steps"] = np.full((num, 1), steps, np.int32)
    if guidance is not None:
        # Distilled text models take guidance as an input of the network, which may be below 1.
        least = 0.0 if info.text_inputs else 1.0
        if not (math.isfinite(guidance) and guidance >= least):
            raise _refused(
                f"guidance: received {guidance:g}, expected a finite number >= {least:g}; "
                f"the server's default is {info.guidance:g}."
            )
        inputs["guidance"] = np.full((num, 1), guidance, np.float32)
    if preview_every:
        _check_all("preview_every", [preview_every], 0, _MAX_INT32, "")
        if not info.decoupled:
            raise _refused(
                f"preview_every: {info.name} does not stream. Write its repository with "
                "`treeq-export serve --decoupled`, or leave --preview-every out."
            )
        inputs["preview_every"] = np.full((num, 1), preview_every, np.int32)
    for name in inputs:
        if name not in info.inputs:
            raise _refused(f"{name}: {info.name} has no such input. Leave it out.")
    return inputs


def _refused(message: str) -> ServeError:
    return ServeError(message, kind="refused")


def _check_all(name: str, values: Sequence[int], low: int, high: int, hint: str) -> None:
    for value in values:
        if not low <= value <= high:
            wanted = f"{low} or more" if high in (_MAX_SEED, _MAX_INT32) else f"{low}..{high}"
            raise _refused(f"{name}: received {value}, expected {wanted}.{hint}")


def _conditioning(
    info: SamplerInfo, label: int | Sequence[int] | None, conditioning: Arrays | None, num: int
) -> dict[str, NDArray[Any]]:
    """Return the label, or the text inputs, with `num` rows."""
    if info.num_classes is not None:
        if label is None or conditioning is not None:
            raise _refused(
                f"label: {info.model} is class-conditional. Give --label "
                f"0..{info.num_classes - 1}, and no conditioning."
            )
        labels = [label] * num if isinstance(label, int) else list(label)
        hint = f" {info.model} has {info.num_classes} classes."
        _check_all("label", labels, 0, info.num_classes - 1, hint)
        if len(labels) != num:
            raise _refused(f"label: received {len(labels)} labels, expected one or {num}.")
        return {"label": np.array(labels, np.int32)[:, None]}
    if label is not None or conditioning is None:
        raise _refused(
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
        raise _refused(
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
            raise _refused(
                f"{where}: {name}: received shape {rows[name].shape}, expected (prompts, {axes}). "
                "Encode the prompts for this model."
            )
        if not np.isfinite(rows[name].astype(np.float32)).all():
            raise _refused(f"{where}: {name}: holds NaN or infinity. Encode the prompts again.")


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
        raise _refused(str(error)) from error
    _check_rows(info, tensors, str(path))
    if len({len(rows) for rows in tensors.values()}) != 1:
        raise _refused(
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
        shape: As its model's configuration says; an axis of any size (-1) gets 1.
        dtype: Its type.

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


@dataclass(frozen=True)
class Response:
    """One response of the sampler.

    Attributes:
        arrays: Outputs by name, with the batch axis.
        latency_ms: Since the request was sent.
        is_last: Whether no other follows; else it is a preview.
    """

    arrays: dict[str, NDArray[Any]]
    latency_ms: float
    is_last: bool


def sample(
    connection: Connection, info: SamplerInfo, inputs: Arrays, outputs: Sequence[str]
) -> Response:
    """Run one request and return its last response, by a stream where the sampler wants one.

    Raises:
        ServeError: Whatever went wrong.
    """
    *_, last = responses(connection, info, inputs, outputs)
    return last


def responses(
    connection: Connection, info: SamplerInfo, inputs: Arrays, outputs: Sequence[str]
) -> Iterator[Response]:
    """Run one request and yield its previews and its result.

    Args:
        connection: To the server.
        info: The sampler.
        inputs: As from `make_inputs`.
        outputs: Names of the wanted outputs.

    Yields:
        Responses; the last is the image.

    Raises:
        ServeError: Whatever went wrong.
    """
    missing = [name for name in outputs if name not in info.outputs]
    if missing:
        raise _refused(
            f"{info.name}: has no output {missing[0]}, only {', '.join(info.outputs)}."
            + (" Write the raw sample with --latents FILE.npy." if missing == ["image"] else "")
        )
    names = list(dict.fromkeys([*outputs, "step"]))
    num = len(next(iter(inputs.values())))
    start = time.perf_counter()
    if not info.decoupled:
        arrays = connection.infer(info.name, inputs, names)
        _check_arrays(connection, info, arrays, num)
        yield Response(arrays, (time.perf_counter() - start) * 1e3, is_last=True)
        return
    steps = int(inputs["steps"].max()) if "steps" in inputs else info.steps
    step = 0
    for arrays in connection.stream(info.name, inputs, names):
        _check_arrays(connection, info, arrays, num)
        before, step = step, int(arrays["step"].max())
        if not before < step <= steps:
            raise connection.error(
                "failed", f"{info.name}: step {step} after {before}, expected the next of {steps}"
            )
        yield Response(arrays, (time.perf_counter() - start) * 1e3, is_last=step >= steps)
    if step < steps:
        raise connection.error("failed", f"{info.name}: the stream ended at step {step} of {steps}")


def _check_arrays(connection: Connection, info: SamplerInfo, arrays: Arrays, num: int) -> None:
    """Check the shapes of what came back against the sampler's configuration."""
    for name, array in arrays.items():
        shape = (num, *info.outputs.get(name, (1,)))
        fits = array.ndim == len(shape) and all(
            found > 0 and size in (-1, found)
            for size, found in zip(shape, array.shape, strict=True)
        )
        if not fits or (name == "step" and array.dtype.kind not in "iu"):
            raise connection.error(
                "failed",
                f"{info.name}: {name}: received {array.dtype} {array.shape}, expected {shape}",
            )
