"""Triton's gRPC protocol, by the messages and the stub that tritonclient brings.

tritonclient's own client reads a stream in a thread, without a limit on what waits; the stub gives
the next response when it is asked for, and every call has one deadline.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from treeq_export.client.answers import (
    CONFIG,
    INDEX,
    MAX_JSON_BYTES,
    MAX_TENSOR_BYTES,
    STATISTICS,
    IndexEntry,
    ModelConfig,
    Statistics,
    pick_outputs,
    read_form,
    read_tensor,
)
from treeq_export.client.connection import Arrays, Connection, ServerAddress, triton_type
from treeq_export.errors import ServeError

messages: Any = service_pb2  # whose classes protobuf makes at import

_PLAIN = 1  # bit set of compressions: none, since a small message may stand for a huge one
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", MAX_TENSOR_BYTES),
    ("grpc.compression_enabled_algorithms_bitset", _PLAIN),
    # A new connection tries again at once: without these two it would share the back-off, of up
    # to two minutes, of an earlier one that had found no server.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_MAX_SEARCHED = 4000  # characters of a message
_REFUSED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.UNAUTHENTICATED,
}
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
# A message that is none is an error of the call; grpc would print its traceback besides.
logging.getLogger("grpc._common").setLevel(logging.CRITICAL)


class GrpcConnection(Connection):
    """A channel; it connects with the first call."""

    def __init__(self, address: ServerAddress, timeout_s: float) -> None:
        super().__init__(address, timeout_s)
        self._channel = grpc.insecure_channel(address.target, options=_CHANNEL)
        self._stub = GRPCInferenceServiceStub(self._channel)
        self._metadata = [("authorization", address.authorization)] if address.user else []

    def close(self) -> None:
        """Close the channel; calls of other threads end."""
        self._channel.close()

    def is_server_live(self) -> bool:
        """See `Connection`."""
        return bool(self._call(self._stub.ServerLive, messages.ServerLiveRequest()).live)

    def is_server_ready(self) -> bool:
        """See `Connection`."""
        return bool(self._call(self._stub.ServerReady, messages.ServerReadyRequest()).ready)

    def is_model_ready(self, model: str) -> bool:
        """See `Connection`."""
        request = messages.ModelReadyRequest(name=model)
        return bool(self._call(self._stub.ModelReady, request).ready)

    def server_version(self) -> str:
        """See `Connection`."""
        return self._call(self._stub.ServerMetadata, messages.ServerMetadataRequest()).version

    def models(self) -> list[IndexEntry]:
        """See `Connection`."""
        index = self._call(self._stub.RepositoryIndex, messages.RepositoryIndexRequest())
        form = [
            {key: value for key, value in each.items() if value or key == "name"}
            for each in self._form(index)["models"]
        ]
        return self.checked(read_form, INDEX, form)

    def model_config(self, model: str) -> ModelConfig:
        """See `Connection`."""
        request = messages.ModelConfigRequest(name=model)
        config = self._call(self._stub.ModelConfig, request).config
        return self.checked(read_form, CONFIG, self._form(config))

    def statistics(self, model: str) -> Statistics:
        """See `Connection`."""
        request = messages.ModelStatisticsRequest(name=model)
        form = self._form(self._call(self._stub.ModelStatistics, request))
        return self.checked(read_form, STATISTICS, form)

    def load(self, model: str) -> None:
        """See `Connection`."""
        request = messages.RepositoryModelLoadRequest(model_name=model)
        self._call(self._stub.RepositoryModelLoad, request, self.load_timeout_s)

    def unload(self, model: str) -> None:
        """See `Connection`."""
        request = messages.RepositoryModelUnloadRequest(model_name=model)
        self._call(self._stub.RepositoryModelUnload, request, self.load_timeout_s)

    def infer(self, model: str, inputs: Arrays, outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """See `Connection`."""
        request = _encode(model, inputs, outputs)
        answer = self._call(self._stub.ModelInfer, request)
        return self.checked(_decode, model, answer, outputs)

    def stream(
        self, model: str, inputs: Arrays, outputs: Sequence[str]
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """See `Connection`; the deadline is that of the whole stream."""
        request = _encode(model, inputs, outputs)
        request.parameters["triton_enable_empty_final_response"].bool_param = True
        # Never with the header triton_grpc_error, by which errors keep their status: an error in
        # such a stream can end the server with SIGSEGV (2.51; after 7, 138, 261 errors).
        responses = self._open_stream(request)
        try:
            while (response := self._next(responses)) is not None:
                if response.error_message:
                    refused = _REFUSAL.search(response.error_message[:_MAX_SEARCHED]) is not None
                    raise self.error("refused" if refused else "failed", response.error_message)
                answer = response.infer_response
                if answer.outputs:
                    yield self.checked(_decode, model, answer, outputs)
                if answer.parameters["triton_final_response"].bool_param:
                    return
        finally:
            responses.cancel()

    def _open_stream(self, request: Any) -> Any:
        try:
            return self._stub.ModelStreamInfer(
                iter([request]), timeout=self.timeout_s, metadata=self._metadata
            )
        except ValueError as error:  # of a channel that was closed
            raise self.unreachable(error) from error

    def _next(self, responses: Any) -> Any:
        """Return the next response of a stream; None at its end."""
        try:
            return next(responses, None)
        except grpc.RpcError as error:
            raise self._translate(error, self.timeout_s) from error

    def _call(
        self, method: Callable[..., Any], request: Message, timeout_s: float | None = None
    ) -> Any:
        """Call one of the stub's methods; raise the error that it stands for."""
        wait_s = timeout_s or self.timeout_s
        try:
            return method(request, timeout=wait_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._translate(error, wait_s) from error
        except ValueError as error:  # of a channel that was closed
            raise self.unreachable(error) from error

    def _translate(self, error: Any, waited_s: float) -> ServeError:
        status, message = error.code(), error.details() or str(error.code())
        if status is grpc.StatusCode.DEADLINE_EXCEEDED:
            return self.timeout(waited_s)
        lower = message[:_MAX_SEARCHED].lower()
        if status is grpc.StatusCode.UNAVAILABLE and any(word in lower for word in _NO_CONNECTION):
            return self.unreachable(message.rsplit(": ", 1)[-1].rstrip("]"))
        return self.error("refused" if status in _REFUSED else "failed", message)

    def _form(self, message: Message) -> dict[str, Any]:
        if message.ByteSize() > MAX_JSON_BYTES:
            raise self.error(
                "failed", f"the answer is too large, expected at most {MAX_JSON_BYTES} bytes"
            )
        return json_form(message)


def _decode(model: str, answer: Any, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Return the wanted outputs of an answer.

    Raises:
        ValueError: One is missing, or has other bytes than its shape says.
    """
    found: dict[str, NDArray[Any]] = {}
    # Values in the message itself, as no Triton sends them, count as no bytes.
    values = [*answer.raw_output_contents, *([b""] * len(answer.outputs))]
    for tensor, data in zip(answer.outputs, values, strict=False):
        if tensor.name in names:
            where = f"{model}: {tensor.name}"
            found[tensor.name] = read_tensor(where, tensor.datatype, tensor.shape, data)
    return pick_outputs(model, found, names)


def _encode(model: str, inputs: Arrays, outputs: Sequence[str]) -> Any:
    """Return a request.

    Raises:
        ServeError: An array's dtype has no Triton type.
    """
    request = messages.ModelInferRequest(model_name=model)
    for name, array in inputs.items():
        request.inputs.add(name=name, datatype=triton_type(name, array), shape=array.shape)
        request.raw_input_contents.append(np.ascontiguousarray(array).tobytes())
    for name in outputs:
        request.outputs.add(name=name)
    return request


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
        known = field.enum_type.values_by_number.get(value)  # a newer server may have others
        return str(value) if known is None else known.name
    return value
