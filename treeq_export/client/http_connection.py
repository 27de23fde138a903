"""Triton's HTTP protocol: requests encoded by tritonclient, exchanges bounded by `BoundedHttp`.

tritonclient's own HTTP client runs on gevent, which ties a client to the thread that made it and
leaves two file descriptors behind for every thread that ever used one; and it bounds neither an
exchange's time nor an answer's size.
"""

from collections.abc import Iterator, Sequence
from http.client import HTTPException, HTTPResponse, RemoteDisconnected
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
import tritonclient.http as triton
from numpy.typing import NDArray
from pydantic import TypeAdapter

from treeq_export.client.answers import (
    CONFIG,
    ERROR,
    INDEX,
    INFER,
    MAX_JSON_BYTES,
    MAX_TENSOR_BYTES,
    METADATA,
    STATISTICS,
    IndexEntry,
    ModelConfig,
    OutputTensor,
    Statistics,
    number_type,
    pick_outputs,
    read_json,
    read_tensor,
)
from treeq_export.client.connection import Arrays, Connection, ServerAddress, refused, triton_type
from treeq_export.client.deadline import BoundedHttp, TooLargeError

Form = TypeVar("Form")

_JSON_SIZE = "Inference-Header-Content-Length"  # bytes of JSON before the binary part of a body
_NOT_IMPLEMENTED = 501  # a request that this model or server has no way to answer
_STALE = (RemoteDisconnected, ConnectionResetError, BrokenPipeError)
_HEADER_BYTES = 256 << 10  # of an answer, beside its body
_MAX_DIGITS = 10


class HttpConnection(Connection):
    """A connection that is kept alive between requests."""

    def __init__(self, address: ServerAddress, timeout_s: float) -> None:
        super().__init__(address, timeout_s)
        self._http = BoundedHttp(address.host, address.port)
        self._headers = {"Authorization": address.authorization} if address.user else {}

    def close(self) -> None:
        """Close the socket."""
        self._http.close()

    def abort(self) -> None:
        """See `Connection`."""
        self._http.abort()

    def is_server_live(self) -> bool:
        """See `Connection`."""
        return self._is_ok("v2/health/live")

    def is_server_ready(self) -> bool:
        """See `Connection`."""
        return self._is_ok("v2/health/ready")

    def is_model_ready(self, model: str) -> bool:
        """See `Connection`."""
        return self._is_ok(f"v2/models/{quote(model, safe='')}/ready")

    def server_version(self) -> str:
        """See `Connection`."""
        return self._json(METADATA, "GET", "v2").get("version", "")

    def models(self) -> list[IndexEntry]:
        """See `Connection`."""
        return self._json(INDEX, "POST", "v2/repository/index")

    def model_config(self, model: str) -> ModelConfig:
        """See `Connection`."""
        return self._json(CONFIG, "GET", f"v2/models/{quote(model, safe='')}/config")

    def statistics(self, model: str) -> Statistics:
        """See `Connection`."""
        return self._json(STATISTICS, "GET", f"v2/models/{quote(model, safe='')}/stats")

    def load(self, model: str) -> None:
        """See `Connection`."""
        self._order(f"v2/repository/models/{quote(model, safe='')}/load")

    def unload(self, model: str) -> None:
        """See `Connection`."""
        self._order(f"v2/repository/models/{quote(model, safe='')}/unload")

    def infer(self, model: str, inputs: Arrays, outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """See `Connection`."""
        wanted = [triton.InferRequestedOutput(name, binary_data=True) for name in outputs]
        encoded = []
        for name, array in inputs.items():
            value = triton.InferInput(name, list(array.shape), triton_type(name, array))
            encoded.append(value.set_data_from_numpy(np.ascontiguousarray(array)))
        body, json_size = triton.InferenceServerClient.generate_request_body(
            encoded, outputs=wanted
        )
        headers = {} if json_size is None else {_JSON_SIZE: str(json_size)}
        path = f"v2/models/{quote(model, safe='')}/infer"
        response, data = self._ask("POST", path, body, headers, max_bytes=MAX_TENSOR_BYTES)
        return self.checked(_read_outputs, model, data, response.getheader(_JSON_SIZE), outputs)

    def stream(
        self, model: str, inputs: Arrays, outputs: Sequence[str]
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """Raise the error that says so: HTTP has one response per request."""
        raise refused(
            f"{self.url}: {model}: HTTP cannot stream. Use grpc://{self.address.host}:PORT; "
            "Triton's own port of gRPC is 8001."
        )

    def _is_ok(self, path: str) -> bool:
        return self._exchange("GET", path)[0].status == 200

    def _json(self, form: TypeAdapter[Form], method: str, path: str) -> Form:
        return self.checked(read_json, form, self._ask(method, path)[1])

    def _order(self, path: str) -> None:
        """Ask for what may take as long as loading a model does."""
        with HttpConnection(self.address, self.load_timeout_s) as patient:
            patient._ask("POST", path, b"{}")

    def _ask(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        max_bytes: int = MAX_JSON_BYTES,
    ) -> tuple[HTTPResponse, bytes]:
        """Return a successful response and its body; raise what any other says."""
        response, data = self._exchange(method, path, body, headers, max_bytes)
        if response.status == 200:
            return response, data
        refused = 400 <= response.status < 500 or response.status == _NOT_IMPLEMENTED
        try:
            message = read_json(ERROR, data)["error"]
        except ValueError:
            message = f"{path}: HTTP status {response.status} {response.reason}"
        raise self.error("refused" if refused else "failed", message)

    def _exchange(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        max_bytes: int = MAX_JSON_BYTES,
    ) -> tuple[HTTPResponse, bytes]:
        """Return the response and its body, whatever its status."""
        self._http.begin(self.timeout_s, max_bytes + _HEADER_BYTES)
        reused = self._http.sock is not None
        try:
            try:
                return self._send(method, path, body, headers, max_bytes)
            except _STALE:
                self._http.close()
                if not reused:
                    raise
                # Closed by the server since the last request; nothing was lost.
                return self._send(method, path, body, headers, max_bytes)
        except TimeoutError as error:
            self._http.close()
            raise self.timeout(self.timeout_s) from error
        except TooLargeError as error:
            self._http.close()
            raise self.error(
                "failed",
                f"{path}: the answer is too large, expected at most {max_bytes} bytes. "
                "Another server?",
            ) from error
        except OSError as error:
            self._http.close()
            raise self.unreachable(error.strerror or error) from error
        # Beside HTTPException: what the standard library's parser makes of chunks of odd sizes.
        except (HTTPException, ValueError, OverflowError, MemoryError) as error:
            self._http.close()
            raise self.unreachable("its answer is not HTTP; the port of gRPC?") from error

    def _send(
        self,
        method: str,
        path: str,
        body: bytes,
        headers: dict[str, str] | None,
        max_bytes: int,
    ) -> tuple[HTTPResponse, bytes]:
        target = f"{self.address.path}/{path}"
        self._http.request(method, target, body, self._headers | (headers or {}))
        with self._http.getresponse() as response:
            if (response.length or 0) > max_bytes:
                raise TooLargeError
            encoding = response.getheader("Content-Encoding", "identity")
            if encoding.lower() != "identity":  # none was asked for
                self._http.close()
                raise self.error(
                    "failed",
                    f"{path}: received an answer compressed by {encoding!r}, expected a plain one",
                )
            return response, response.read()


def _read_outputs(
    model: str, data: bytes, json_size: str | None, names: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """Return those outputs of an answer that are wanted: JSON, then the values of each in turn.

    Raises:
        ValueError: It is something else.
    """
    size = len(data) if json_size is None else _read_size(json_size)
    answer = read_json(INFER, data[: min(size, MAX_JSON_BYTES)])
    rest = memoryview(data)[size:]
    found: dict[str, NDArray[Any]] = {}
    for tensor in answer["outputs"]:
        num = tensor.get("parameters", {}).get("binary_data_size")
        if tensor["name"] in names:
            where = f"{model}: {tensor['name']}"
            found[tensor["name"]] = _read_values(where, tensor, None if num is None else rest[:num])
        rest = rest[num or 0 :]
    return pick_outputs(model, found, names)


def _read_values(where: str, tensor: OutputTensor, data: memoryview | None) -> NDArray[Any]:
    if data is not None:
        return read_tensor(where, tensor["datatype"], tensor["shape"], data)
    try:
        values = np.array(tensor.get("data", []), number_type(where, tensor["datatype"]))
        return values.reshape(tensor["shape"])
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: received values of another type or number") from error


def _read_size(text: str) -> int:
    if not (text.isdecimal() and len(text) <= _MAX_DIGITS):
        raise ValueError(f"received {_JSON_SIZE} {text[:_MAX_DIGITS]!r}, expected a number")
    return int(text)
