"""The responses of the sampler: previews, the result, and their checks."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from treeq_export.client.connection import Arrays, Connection, refused
from treeq_export.client.sampler import SamplerInfo


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
        connection: Connection to the server.
        info: The sampler.
        inputs: Inputs from `make_inputs`.
        outputs: Names of the wanted outputs.

    Yields:
        Responses; the last is the image.

    Raises:
        ServeError: Whatever went wrong.
    """
    missing = [name for name in outputs if name not in info.outputs]
    if missing:
        raise refused(
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
