"""Servers of a few lines that answer as Triton does, but for what a test exchanges."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as messages

from treeq_export.client.connection import Connection
from treeq_export.client.inputs import make_inputs
from treeq_export.client.responses import sample
from treeq_export.client.sampler import read_info
from treeq_export.errors import ServeError

CONFIG: dict[str, Any] = {
    "name": "sampler",
    "backend": "python",
    "max_batch_size": 4,
    "input": [
        {"name": "label", "data_type": "TYPE_INT32", "dims": [1]},
        {"name": "seed", "data_type": "TYPE_INT64", "dims": [1]},
        {"name": "steps", "data_type": "TYPE_INT32", "dims": [1], "optional": True},
        {"name": "guidance", "data_type": "TYPE_FP32", "dims": [1], "optional": True},
    ],
    "output": [
        {"name": "latents", "data_type": "TYPE_FP32", "dims": [1, 2, 2]},
        {"name": "image", "data_type": "TYPE_UINT8", "dims": [2, 2, 1]},
        {"name": "step", "data_type": "TYPE_INT32", "dims": [1]},
    ],
    "parameters": {
        f"treeq_{key}": {"string_value": value}
        for key, value in {
            "mode": "inprocess",
            "model": "digits",
            "target": "ort",
            "steps": "4",
            "guidance": "1.5",
            "num_classes": "10",
        }.items()
    },
}
INDEX = [{"name": "sampler", "version": "1", "state": "READY"}]
STATISTICS = {"model_stats": [{"name": "sampler", "version": "1", "inference_count": 3}]}
ARRAYS: dict[str, NDArray[Any]] = {
    "latents": np.zeros((1, 1, 2, 2), np.float32),
    "image": np.full((1, 2, 2, 1), 7, np.uint8),
    "step": np.full((1, 1), 4, np.int32),
}
_TYPES = {"latents": "FP32", "image": "UINT8", "step": "INT32"}


def outputs_of(names: list[str], **changes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the JSON of outputs, each with changes by its name."""
    return [
        {
            "name": name,
            "datatype": _TYPES[name],
            "shape": list(ARRAYS[name].shape),
            "parameters": {"binary_data_size": ARRAYS[name].nbytes},
            **changes.get(name, {}),
        }
        for name in names
    ]


def http_answer(
    body: bytes | Any, status: str = "200 OK", headers: Mapping[str, str] | None = None
) -> bytes:
    """Return a whole answer; a body that is no bytes becomes JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(data)}"]
    lines += [f"{key}: {value}" for key, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + data


def infer_answer(outputs: list[dict[str, Any]], data: bytes, **header: str) -> bytes:
    """Return the answer to a request: JSON, then bytes."""
    text = json.dumps({"model_name": "sampler", "outputs": outputs}).encode()
    size = header.pop("size", str(len(text)))
    return http_answer(text + data, headers={"Inference-Header-Content-Length": size})


def right_answer(path: str, body: bytes) -> bytes:
    """Return what Triton would."""
    if path.endswith("/infer"):
        size = body.index(b"}]}") + 3 if b"}]}" in body else len(body)
        wanted = [each["name"] for each in _json_start(body, size)["outputs"]]
        data = b"".join(ARRAYS[name].tobytes() for name in wanted)
        return infer_answer(outputs_of(wanted), data)
    answers = {"/config": CONFIG, "/index": INDEX, "/stats": STATISTICS, "/v2": {"version": "2.51"}}
    return http_answer(next((a for end, a in answers.items() if path.endswith(end)), {}))


def _json_start(body: bytes, _size: int) -> dict[str, Any]:
    return json.JSONDecoder().raw_decode(body.decode("latin1"))[0]


Answer = Callable[[socket.socket, str], None]


@contextmanager
def http_server(special: Mapping[str, bytes | Answer] | None = None) -> Iterator[str]:
    """Serve HTTP, one thread per connection.

    Args:
        special: End of a path -> the bytes of the answer, or what is done with the socket; "" is
            every path. May be changed while it serves.

    Yields:
        The URL.
    """
    exchange = special or {}
    stopped = threading.Event()
    sockets: list[socket.socket] = []

    def serve(client: socket.socket) -> None:
        with suppress(OSError, ValueError), client, client.makefile("rb") as file:
            while not stopped.is_set():
                _, path, _ = file.readline().decode().split()
                size = 0
                while (line := file.readline().strip()) != b"":
                    if line.lower().startswith(b"content-length:"):
                        size = int(line.split(b":")[1])
                body = file.read(size)
                answer = next((a for end, a in exchange.items() if path.endswith(end)), None)
                if callable(answer):
                    answer(client, path)
                    return
                client.sendall(right_answer(path, body) if answer is None else answer)

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                sockets.append(client)
                threads.append(threading.Thread(target=serve, args=(client,)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads = [threading.Thread(target=accept)]
        threads[0].start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            stopped.set()
            for each in (listener, *sockets):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()


def drip(client: socket.socket, _path: str) -> None:
    """Promise an answer, and send a byte of it now and then."""
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    with suppress(OSError):
        for _ in range(1000):
            client.sendall(b" ")
            time.sleep(0.05)


def flood(head: bytes, block: bytes = b" " * (1 << 20)) -> Answer:
    """Return what sends blocks without end after a head."""

    def send(client: socket.socket, _path: str) -> None:
        with suppress(OSError):
            client.sendall(head)
            while True:
                client.sendall(block)

    return send


Handler = Callable[[bytes, grpc.ServicerContext], Any]


def right_message(method: str) -> Any:
    """Return what Triton would."""
    if method == "ModelConfig":
        answer = messages.ModelConfigResponse()
        config = answer.config
        config.name, config.backend, config.max_batch_size = "sampler", "python", 4
        for each in CONFIG["input"]:
            optional = each.get("optional", False)
            config.input.add(name=each["name"], dims=each["dims"], optional=optional)
        for each in CONFIG["output"]:
            config.output.add(name=each["name"], dims=each["dims"])
        for key, value in CONFIG["parameters"].items():
            config.parameters[key].string_value = value["string_value"]
        return answer
    if method == "RepositoryIndex":
        answer = messages.RepositoryIndexResponse()
        answer.models.add(name="sampler", version="1", state="READY")
        return answer
    if method == "ModelInfer":
        return message_of(["latents", "image", "step"])
    if method == "ServerMetadata":
        return messages.ServerMetadataResponse(name="triton", version="2.51.0")
    live = {"ServerLive": "live", "ServerReady": "ready", "ModelReady": "ready"}
    response = getattr(messages, f"{method}Response")
    return response(**{live[method]: True}) if method in live else response()


def message_of(names: list[str], **changes: Any) -> Any:
    """Return a ModelInferResponse; changes are (datatype, shape, bytes) by name."""
    answer = messages.ModelInferResponse(model_name="sampler")
    for name in names:
        array = ARRAYS[name]
        datatype, shape, data = changes.get(name, (_TYPES[name], array.shape, array.tobytes()))
        answer.outputs.add(name=name, datatype=datatype, shape=shape)
        answer.raw_output_contents.append(data)
    return answer


_METHODS = (
    "ServerLive",
    "ServerReady",
    "ServerMetadata",
    "ModelReady",
    "ModelConfig",
    "ModelStatistics",
    "ModelInfer",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
)


@contextmanager
def grpc_server(special: Mapping[str, Handler] | None = None, **options: Any) -> Iterator[str]:
    """Serve gRPC.

    Args:
        special: Method -> what answers it, a message or bytes; of ModelStreamInfer an iterator.
        options: Of grpc.server.

    Yields:
        The URL.
    """
    exchange = special or {}

    def plain(method: str) -> Handler:
        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            handler = exchange.get(method)
            found = right_message(method) if handler is None else handler(request, context)
            return found if isinstance(found, bytes) else found.SerializeToString()

        return answer

    def stream(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for found in exchange["ModelStreamInfer"](next(requests), context):
            yield found if isinstance(found, bytes) else found.SerializeToString()

    handlers: dict[str, Any] = {
        method: grpc.unary_unary_rpc_method_handler(plain(method)) for method in _METHODS
    }
    handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(stream)
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool, options=[("grpc.max_send_message_length", -1)], **options)
        service = "inference.GRPCInferenceService"
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"grpc://127.0.0.1:{port}"
        finally:
            server.stop(0).wait()


def one_line_error(call: Callable[[], Any], within_s: float) -> ServeError:
    """Return the error of a call: in time, one line of moderate length, no control characters."""
    begin = time.monotonic()
    with pytest.raises(ServeError) as caught:
        call()
    assert time.monotonic() - begin < within_s
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1500
    return caught.value


def ask_for_image(connection: Connection) -> Any:
    """Return what a client gets that asks for one image."""
    info = read_info(connection)
    return sample(connection, info, make_inputs(info, label=1, seed=2), ["image"])
