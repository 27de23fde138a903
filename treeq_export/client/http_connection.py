"""Triton's HTTP protocol: bodies by tritonclient, sockets by the standard library.

tritonclient's own HTTP client runs on gevent, which ties a client to the thread that made it and
leaves two file descriptors behind for every thread that ever used one. Its encoding of requests
and responses is public by itself, and that is what is used here.
"""

import json
from base64 import b64encode
from collections.abc import Iterator, Sequence
from http.client import HTTPConnection, HTTPException, HTTPResponse, RemoteDisconnected
from typing import Any
from urllib.parse import quote

import tritonclient.http as triton
from numpy.typing import NDArray

from treeq_export.client.connection import Arrays, Connection, ServerAddress
from treeq_export.errors import ServeError

_JSON_SIZE = "Inference-Header-Content-Length"  # bytes of JSON before the binary part of a body
_NOT_IMPLEMENTED = 501  # a request that this model or server has no way to answer
_STALE = (RemoteDisconnected, ConnectionResetError, BrokenPipeError)


class HttpConnection(Connection):
    """A connection that is kept alive between requests."""

    def __init__(self, address: ServerAddress, timeout_s: float) -> None:
        super().__init__(address, timeout_s)
        self._http = HTTPConnection(address.host, address.port, timeout=timeout_s)
        self._headers: dict[str, str] = {}
        if address.user:
            token = b64encode(f"{address.user}:{address.password}".encode()).decode()
            self._headers["Authorization"] = f"Basic {token}"

    def close(self) -> None:
        """Close the socket."""
        self._http.close()

    def is_server_live(self) -> bool:
        """See `Connection`."""
        return self._is_ok("v2/health/live")

    def is_server_ready(self) -> bool:
        """See `Connection`."""
        return self._is_ok("v2/health/ready")

    def is_model_ready(self, model: str) -> bool:
        """See `Connection`."""
        return self._is_ok(f"v2/models/{quote(model, safe='')}/ready")

    def models(self) -> list[dict[str, Any]]:
        """See `Connection`."""
        return self._json("POST", "v2/repository/index")

    def model_config(self, model: str) -> dict[str, Any]:
        """See `Connection`."""
        return self._json("GET", f"v2/models/{quote(model, safe='')}/config")

    def statistics(self, model: str) -> dict[str, Any]:
        """See `Connection`."""
        return self._json("GET", f"v2/models/{quote(model, safe='')}/stats")

    def load(self, model: str) -> None:
        """See `Connection`."""
        self._order(f"v2/repository/models/{quote(model, safe='')}/load")

    def unload(self, model: str) -> None:
        """See `Connection`."""
        self._order(f"v2/repository/models/{quote(model, safe='')}/unload")

    def infer(self, model: str, inputs: Arrays, outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """See `Connection`."""
        wanted = [triton.InferRequestedOutput(name, binary_data=True) for name in outputs]
        body, json_size = triton.InferenceServerClient.generate_request_body(
            self.encode_inputs(triton, inputs), outputs=wanted
        )
        headers = {} if json_size is None else {_JSON_SIZE: str(json_size)}
        path = f"v2/models/{quote(model, safe='')}/infer"
        response, data = self._ask("POST", path, body, headers)
        size = response.getheader(_JSON_SIZE)
        try:
            result = triton.InferenceServerClient.parse_response_body(
                data, header_length=None if size is None else int(size)
            )
        except ValueError as error:
            raise self._not_triton(data) from error
        return self.decode_outputs(model, result, outputs)

    def stream(
        self, model: str, inputs: Arrays, outputs: Sequence[str]
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """Raise the error that says so: HTTP has one response per request."""
        raise ServeError(
            f"{self.url}: {model}: HTTP cannot stream. Use grpc://{self.address.host}:PORT; "
            "Triton's own port of gRPC is 8001.",
            kind="refused",
        )

    def _is_ok(self, path: str) -> bool:
        return self._exchange("GET", path)[0].status == 200

    def _json(self, method: str, path: str) -> Any:
        _, data = self._ask(method, path)
        try:
            return json.loads(data)
        except ValueError as error:
            raise self._not_triton(data) from error

    def _order(self, path: str) -> None:
        """Ask for what may take as long as loading a model does."""
        with HttpConnection(self.address, self.load_timeout_s) as patient:
            patient._ask("POST", path, b"{}")

    def _ask(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[HTTPResponse, bytes]:
        """Return a successful response and its body; raise what any other says."""
        response, data = self._exchange(method, path, body, headers)
        if response.status == 200:
            return response, data
        refused = 400 <= response.status < 500 or response.status == _NOT_IMPLEMENTED
        try:
            message = json.loads(data)["error"]
        except (ValueError, KeyError, TypeError):
            message = f"{path}: HTTP status {response.status} {response.reason}"
        raise self.error("refused" if refused else "failed", message)

    def _exchange(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[HTTPResponse, bytes]:
        """Return the response and its body, whatever its status."""
        try:
            try:
                return self._send(method, path, body, headers)
            except _STALE:  # closed by the server since the last request; nothing was lost
                self._http.close()
                return self._send(method, path, body, headers)
        except TimeoutError as error:
            self._http.close()
            raise self.timeout(self.timeout_s) from error
        except OSError as error:
            self._http.close()
            raise self.unreachable(error.strerror or error) from error
        except HTTPException as error:
            self._http.close()
            raise self.unreachable("its answer is not HTTP; the port of gRPC?") from error

    def _send(
        self, method: str, path: str, body: bytes, headers: dict[str, str] | None
    ) -> tuple[HTTPResponse, bytes]:
        target = f"{self.address.path}/{path}"
        self._http.request(method, target, body, self._headers | (headers or {}))
        response = self._http.getresponse()
        return response, response.read()

    def _not_triton(self, data: bytes) -> ServeError:
        start = data[:40].decode(errors="replace")
        return self.error("failed", f"received {start!r}, expected Triton's JSON. Another server?")
