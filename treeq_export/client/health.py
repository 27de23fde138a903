"""Health by one real inference, and healing.

Ready is not healthy: after the process of a model has died, Triton goes on saying that server and
model are ready, while every request fails. So each model is asked for something that it has to
compute: the sampler for one step, everything it is made of for the answer to zeros.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeq_export.client.answers import clean
from treeq_export.client.connection import Connection
from treeq_export.client.inputs import make_inputs, zero_conditioning, zeros
from treeq_export.client.responses import sample
from treeq_export.client.sampler import SAMPLER, read_info
from treeq_export.errors import ServeError
from treeq_export.records.health import HealthRecord, ModelHealth

# What a sampler may be made of, in the order of loading.
PARTS = ("denoiser", "vae_decoder")
_DTYPES: dict[str, type[np.generic]] = {
    "TYPE_FP32": np.float32,
    "TYPE_FP16": np.float16,
    "TYPE_INT64": np.int64,
    "TYPE_INT32": np.int32,
    "TYPE_UINT8": np.uint8,
}
_DIED = "is not healthy"  # in what Triton says of a model whose process has died
_UNLOADED_WITHIN_S = 10.0
_MAX_VERSION = 40  # characters


def check(connection: Connection, model: str = SAMPLER) -> HealthRecord:
    """Check a server by real requests.

    Args:
        connection: To the server.
        model: The sampler's name.

    Returns:
        The health; a server that is down is found to be down, without an exception.
    """
    live = ready = None
    try:
        live, ready = connection.is_server_live(), connection.is_server_ready()
        loaded = {entry["name"] for entry in connection.models() if entry.get("state") == "READY"}
        parts = [part for part in PARTS if part in loaded and part != model]
        models = [check_model(connection, name, model) for name in (model, *parts)]
    except ServeError as error:
        line = str(error).removeprefix(f"{connection.url}: ")
        return HealthRecord(url=connection.url, live=live, ready=ready, models=[], error=line)
    found = HealthRecord(url=connection.url, live=live, ready=ready, models=models)
    if found.healthy:
        with suppress(ServeError):  # which may be restricted
            version = clean(connection.server_version(), _MAX_VERSION)
            return found.model_copy(update={"server_version": version})
    return found


def check_model(connection: Connection, name: str, sampler: str = SAMPLER) -> ModelHealth:
    """Ask one model for one real answer.

    Args:
        connection: To the server.
        name: The model.
        sampler: The sampler's name: it is asked for an image of one step, any other for zeros.
    """
    ready = latency_ms = None
    try:
        ready = connection.is_model_ready(name)
        ask = _ask_sampler if name == sampler else _ask_with_zeros
        elapsed_ms, arrays = ask(connection, name)
        bad = [key for key, array in arrays.items() if not _is_finite(array)]
        if bad:
            received = f"{bad[0]}: NaN, infinity or nothing, expected finite numbers"
        else:
            latency_ms = elapsed_ms
            received = ", ".join(f"{key} {each.dtype} {each.shape}" for key, each in arrays.items())
    except ServeError as error:
        received = str(error).removeprefix(f"{connection.url}: ")
    return ModelHealth(
        name=name,
        ready=ready,
        healthy=latency_ms is not None,
        latency_ms=latency_ms,
        received=received,
    )


def _is_finite(array: NDArray[Any]) -> bool:
    return bool(array.size) and bool(np.isfinite(array).all())


def _ask_sampler(connection: Connection, name: str) -> tuple[float, Mapping[str, NDArray[Any]]]:
    info = read_info(connection, name)
    inputs = make_inputs(
        info,
        label=None if info.num_classes is None else 0,
        seed=0,
        steps=1,
        conditioning=zero_conditioning(info),
    )
    response = sample(connection, info, inputs, ["latents"])
    return response.latency_ms, response.arrays


def _ask_with_zeros(connection: Connection, name: str) -> tuple[float, Mapping[str, NDArray[Any]]]:
    config = connection.model_config(name)
    batch = [1] if config.get("max_batch_size", 0) > 0 else []
    inputs = {
        value["name"]: zeros(
            value["name"],
            (*batch, *value["dims"]),
            np.dtype(_DTYPES.get(value.get("data_type", ""), np.float32)),
        )
        for value in config.get("input", [])
        if not value.get("optional", False)
    }
    outputs = [value["name"] for value in config.get("output", [])]
    start = time.perf_counter()
    arrays = connection.infer(name, inputs, outputs)
    return (time.perf_counter() - start) * 1e3, arrays


def heal(
    connection: Connection,
    models: Sequence[str],
    model: str = SAMPLER,
    *,
    died: Collection[str] = (),
) -> HealthRecord:
    """Unload and load models, parts before the sampler that calls them, and check again.

    Args:
        connection: To the server.
        models: Names of the models to heal.
        model: The sampler's name.
        died: Names of the models whose process has died. Triton 2.51 never finishes unloading
            such a model, but can load it. Every other model is unloaded, which frees its memory,
            before it is loaded again.

    Returns:
        The health afterwards; `reloaded` says what was done.
    """
    order = [*(part for part in PARTS if part in models), *(m for m in models if m not in PARTS)]
    reloaded: list[str] = []
    try:
        for name in reversed(order):
            connection.unload(name)
        for name in order:
            if name not in died:
                _wait_until_unloaded(connection, name)
            connection.load(name)
            reloaded.append(name)
    except ServeError as error:
        found = check(connection, model)
        line = str(error).removeprefix(f"{connection.url}: ")
        update = {"reloaded": reloaded, "error": f"cannot be healed: {line}"}
        return found.model_copy(update=update)
    return check(connection, model).model_copy(update={"reloaded": reloaded})


def check_and_heal(connection: Connection, model: str = SAMPLER) -> HealthRecord:
    """Check a server, and heal the models that fail: parts first, since that may be all it needs.

    Args:
        connection: To the server.
        model: The sampler's name.

    Returns:
        The health afterwards; `reloaded` is empty where nothing was to be done.
    """
    record = check(connection, model)
    reloaded: list[str] = []
    for names in (PARTS, (model,)):
        sick = [each for each in record.models if not each.healthy and each.name in names]
        if sick:
            died = [each.name for each in sick if _DIED in each.received]
            record = heal(connection, [each.name for each in sick], model, died=died)
            reloaded += record.reloaded
    return record.model_copy(update={"reloaded": reloaded})


def _wait_until_unloaded(connection: Connection, name: str) -> None:
    """Wait a while for the end of an unloading: the server's answer to `unload` comes before."""
    end = time.monotonic() + _UNLOADED_WITHIN_S
    while time.monotonic() < end:
        states = {m.get("state") for m in connection.models() if m["name"] == name}
        if not states & {"READY", "UNLOADING"}:
            return
        time.sleep(0.05)
