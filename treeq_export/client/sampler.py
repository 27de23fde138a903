"""What a server's sampler is, read from its configuration."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from treeq_export.client.answers import MAX_TENSOR_BYTES, TensorConfig, clean
from treeq_export.client.connection import Connection, refused

SAMPLER = "sampler"
CONTROLS = ("label", "seed", "steps", "guidance", "preview_every")  # all else is conditioning
MAX_INT32 = np.iinfo(np.int32).max
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
        steps: Solver steps of the server's default.
        guidance: Guidance scale of the server's default.
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
        connection: Connection to the server.
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
        raise refused(
            f"{connection.url}: {model}: no sampler of treeq-export (its configuration has no "
            "treeq_* parameters). Name the sampler's model with --model."
        ) from error


def _read_count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= MAX_INT32:
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
