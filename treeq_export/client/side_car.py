"""What the page of `treeq-export web` asks for, from one Triton server."""

import base64
import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from treeq_export.client.connection import DEFAULT_TIMEOUT_S, Connection, check_timeout, parse_url
from treeq_export.client.health import check
from treeq_export.client.inputs import load_conditioning, make_inputs, pick_prompt
from treeq_export.client.open import open_connection
from treeq_export.client.picture import to_png
from treeq_export.client.responses import sample
from treeq_export.client.sampler import SAMPLER, read_info
from treeq_export.errors import ServeError
from treeq_export.records.health import HealthRecord


class ImageRequest(BaseModel):
    """Body of POST /api/image; what is left out is the server's default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    label: int | None = None
    prompt: int | None = None
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None


class SideCar:
    """What the page asks for, from one Triton server. Its methods block and may run in any thread.

    Args:
        url: The Triton server.
        model: The sampler's name on it.
        timeout_s: Longest time of one exchange.
        conditioning: File with embedded prompts, of a text model.

    Raises:
        ServeError: The URL is malformed, or the timeout out of range.
    """

    def __init__(
        self,
        url: str,
        model: str = SAMPLER,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        conditioning: Path | None = None,
    ) -> None:
        parse_url(url)
        check_timeout(timeout_s)
        self.model = model
        self._url = url
        self._conditioning = conditioning
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._used: set[Connection] = set()
        self._closed = False

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        """Yield a connection that no other thread uses meanwhile."""
        with self._lock:
            if self._closed:
                raise ServeError(f"{self.model}: this page is ending.", kind="unreachable")
            if self._idle:
                connection = self._idle.pop()
            else:
                connection = open_connection(self._url, self.timeout_s)
            self._used.add(connection)
        try:
            yield connection
        finally:
            with self._lock:
                self._used.discard(connection)
                if self._closed:
                    connection.close()
                else:
                    self._idle.append(connection)

    def close(self) -> None:
        """Close all connections; what other threads wait for ends with an error."""
        with self._lock:
            self._closed = True
            for connection in self._used:
                connection.abort()
            for connection in self._idle:
                connection.close()
            self._idle.clear()

    def describe(self) -> dict[str, Any]:
        """Return the sampler as JSON, asked anew: a server may have loaded another version.

        Raises:
            ServeError: The server cannot be asked.
        """
        with self._connection() as connection:
            info = read_info(connection, self.model)
            num_prompts = None
            if self._conditioning is not None:
                rows = load_conditioning(self._conditioning, info)
                num_prompts = len(next(iter(rows.values())))
            return dataclasses.asdict(info) | {"url": connection.url, "num_prompts": num_prompts}

    def image(self, request: ImageRequest) -> dict[str, Any]:
        """Return one image as JSON: the PNG in base64, its settings, and the latency.

        Raises:
            ServeError: The server refuses or fails.
        """
        with self._connection() as connection:
            info = read_info(connection, self.model)
            rows = None
            if self._conditioning is not None:
                prompts = load_conditioning(self._conditioning, info)
                rows = pick_prompt(prompts, request.prompt or 0)
            inputs = make_inputs(
                info,
                label=request.label,
                seed=request.seed,
                steps=request.steps,
                guidance=request.guidance,
                conditioning=rows,
            )
            response = sample(connection, info, inputs, ["image"])
        pixels = response.arrays["image"][0]
        made = {
            "label": request.label,
            "prompt": request.prompt if rows is not None else None,
            "seed": request.seed,
            "step": int(response.arrays["step"].max()),
            "guidance": info.guidance if request.guidance is None else request.guidance,
            "model": info.model,
            "version": info.version,
        }
        return made | {
            "png": base64.b64encode(to_png(pixels, made, scale=1)).decode(),
            "height": pixels.shape[0],
            "width": pixels.shape[1],
            "latency_ms": response.latency_ms,
        }

    def health(self) -> HealthRecord:
        """Return the health of the server, by a real inference."""
        with self._connection() as connection:
            return check(connection, self.model)
