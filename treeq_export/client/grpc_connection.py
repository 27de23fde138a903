"""Triton's gRPC protocol, by tritonclient."""

import queue
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import tritonclient.grpc as triton
from google.protobuf.message import Message
from numpy.typing import NDArray
from tritonclient.grpc.auth import BasicAuth
from tritonclient.utils import InferenceServerException

from treeq_export.client.connection import Arrays, Connection, ServerAddress
from treeq_export.errors import ServeError

_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A new connection tries again at once: without these two it would share the back-off, of up
    # to two minutes, of an earlier one that had found no server.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_REFUSED = {"INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "ALREADY_EXISTS", "UNAUTHENTICATED"}
# Errors in a stream come without a status: how Triton and our sampler word a refusal.
_REFUSAL = re.compile(
    r"unknown model|unexpected (inference|shape)|expected number of inputs|batch-size must|"
    r"data-type|received .*, expected|holds NaN|preview_every"
)
# How gRPC words an UNAVAILABLE of its own; Triton's mean a full queue, or a server that stops.
_NO_CONNECTION = (
    "failed to connect",
    "connection re",  # refused, reset
    "resolv",
    "socket closed",
    "broken pipe",
    "goaway",
    "endpoint closing",
    "transport",
)


class GrpcConnection(Connection):
    """A channel; it connects with the first call."""

    def __init__(self, address: ServerAddress, timeout_s: float) -> None:
        super().__init__(address, timeout_s)
        self._client = self._open()

    def _open(self) -> triton.InferenceServerClient:
        client = triton.InferenceServerClient(self.address.target, channel_args=_CHANNEL)
        if self.address.user:
            client.register_plugin(BasicAuth(self.address.user, self.address.password))
        return client

    def close(self) -> None:
        """Close the channel."""
        self._client.close()

    def is_server_live(self) -> bool:
        """See `Connection`."""
        return bool(self._call(self._client.is_server_live))

    def is_server_ready(self) -> bool:
        """See `Connection`."""
        return bool(self._call(self._client.is_server_ready))

    def is_model_ready(self, model: str) -> bool:
        """See `Connection`."""
        return bool(self._call(self._client.is_model_ready, model))

    def models(self) -> list[dict[str, Any]]:
        """See `Connection`."""
        index = self._call(self._client.get_model_repository_index)
        return [
            {key: value for key, value in json_form(model).items() if value}
            for model in index.models
        ]

    def model_config(self, model: str) -> dict[str, Any]:
        """See `Connection`."""
        return json_form(self._call(self._client.get_model_config, model).config)

    def statistics(self, model: str) -> dict[str, Any]:
        """See `Connection`."""
        return json_form(self._call(self._client.get_inference_statistics, model))

    def load(self, model: str) -> None:
        """See `Connection`."""
        self._call(self._client.load_model, model, timeout_s=self.load_timeout_s)

    def unload(self, model: str) -> None:
        """See `Connection`."""
        self._call(self._client.unload_model, model, timeout_s=self.load_timeout_s)

    def infer(self, model: str, inputs: Arrays, outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """See `Connection`."""
        encoded = self.encode_inputs(triton, inputs)
        wanted = [triton.InferRequestedOutput(name) for name in outputs]
        result = self._call(self._client.infer, model, encoded, outputs=wanted)
        return self.decode_outputs(model, result, outputs)

    def stream(
        self, model: str, inputs: Arrays, outputs: Sequence[str]
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """See `Connection`; a channel of its own, which ends with the iteration."""
        responses: queue.SimpleQueue[tuple[Any, InferenceServerException | None]]
        responses = queue.SimpleQueue()
        client = self._open()
        try:
            # Never with the header triton_grpc_error, by which errors keep their status: an error
            # in such a stream can end the server with SIGSEGV (2.51; after 7, 138, 261 errors).
            client.start_stream(lambda result, error: responses.put((result, error)))
            encoded = self.encode_inputs(triton, inputs)
            wanted = [triton.InferRequestedOutput(name) for name in outputs]
            with suppress(InferenceServerException):  # it has ended; the queue says why
                client.async_stream_infer(
                    model, encoded, outputs=wanted, enable_empty_final_response=True
                )
            while True:
                result, error = self._next(responses)
                if error is not None:
                    raise self._translate(error, self.timeout_s)
                response = result.get_response()
                if response.outputs:
                    yield self.decode_outputs(model, result, outputs)
                if response.parameters["triton_final_response"].bool_param:
                    return
        finally:
            client.stop_stream(cancel_requests=True)
            client.close()

    def _next(
        self, responses: "queue.SimpleQueue[tuple[Any, InferenceServerException | None]]"
    ) -> tuple[Any, InferenceServerException | None]:
        try:
            return responses.get(timeout=self.timeout_s)
        except queue.Empty:
            raise self.timeout(self.timeout_s) from None

    def _call(
        self, method: Callable[..., Any], *args: Any, timeout_s: float | None = None, **options: Any
    ) -> Any:
        """Call one of the client's methods; raise the error that it stands for."""
        wait_s = timeout_s or self.timeout_s
        try:
            return method(*args, client_timeout=wait_s, **options)
        except InferenceServerException as error:
            raise self._translate(error, wait_s) from error

    def _translate(self, error: InferenceServerException, waited_s: float) -> ServeError:
        status = (error.status() or "").removeprefix("StatusCode.")
        message = error.message() or status
        if status == "DEADLINE_EXCEEDED":
            return self.timeout(waited_s)
        lower = message.lower()
        if status == "UNAVAILABLE" and any(words in lower for words in _NO_CONNECTION):
            return self.unreachable(message.rsplit(": ", 1)[-1].rstrip("]"))
        refused = status in _REFUSED if status else _REFUSAL.search(message) is not None
        return self.error("refused" if refused else "failed", message)


def json_form(message: Message) -> dict[str, Any]:
    """Return a message as Triton's HTTP endpoint prints it.

    Names as in the .proto, empty fields included, 64-bit integers as integers (protobuf's own JSON
    has them as strings), enumerations by name.
    """
    form: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            form[field.name] = {key: _json_value(field, item) for key, item in value.items()}
        elif field.is_repeated:
            form[field.name] = [_json_value(field, item) for item in value]
        elif not field.has_presence or message.HasField(field.name):
            form[field.name] = _json_value(field, value)
    return form


def _json_value(field: Any, value: Any) -> Any:
    if isinstance(value, Message):
        return json_form(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    return value
