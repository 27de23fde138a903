"""What answers over gRPC is not always Triton: every answer ends in time, small, in one line."""

import gzip
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest
from click.testing import CliRunner
from tritonclient.grpc import service_pb2 as messages

from tests.serve.client.fake_servers import (
    ARRAYS,
    Answer,
    Handler,
    ask_for_image,
    grpc_server,
    message_of,
    one_line_error,
    right_message,
)
from treeq_export.cli import main
from treeq_export.client import grpc_connection
from treeq_export.client.answers import MAX_TENSOR_BYTES
from treeq_export.client.health import check
from treeq_export.client.inputs import make_inputs
from treeq_export.client.open import open_connection
from treeq_export.client.responses import responses
from treeq_export.client.sampler import read_info

TIMEOUT_S = 0.5
SLACK_S = 1.5


error_of = partial(one_line_error, within_s=TIMEOUT_S + SLACK_S)


def test_the_fake_server_is_right():
    with grpc_server() as url, open_connection(url) as connection:
        assert ask_for_image(connection).arrays["image"].tolist() == ARRAYS["image"].tolist()
        assert connection.server_version() == "2.51.0"
        assert check(connection).healthy


def config_with(change: Callable[[Any], Any]) -> Handler:
    def answer(_request: bytes, _context: Any) -> Any:
        message = right_message("ModelConfig")
        change(message.config)
        return message

    return answer


def set_parameter(key: str, value: str) -> Handler:
    def change(config: Any) -> None:
        config.parameters[key].string_value = value

    return config_with(change)


WRONG_CONFIG: dict[str, Handler] = {
    "empty": lambda *_: b"",
    "garbage": lambda *_: b"\xff" * 40,
    "another message": lambda *_: messages.ServerMetadataResponse(name="x", version="y"),
    "text that is no UTF-8": lambda *_: b"\x0a\x05\x0a\x03\xff\xfe\xfd",
    "steps": set_parameter("treeq_steps", "-1"),
    "guidance": set_parameter("treeq_guidance", "nan"),
    "negative batch": config_with(lambda config: setattr(config, "max_batch_size", -3)),
    "dims": config_with(lambda config: config.input.add(name="x", dims=[-9])),
    "huge dims": config_with(lambda config: config.input.add(name="x", dims=[2**62])),
    "no outputs": config_with(lambda config: config.ClearField("output")),
    "large": config_with(lambda config: setattr(config, "name", "x" * (5 << 20))),
}


@pytest.mark.parametrize("case", WRONG_CONFIG)
def test_a_configuration_of_another_form(case: str, caplog: pytest.LogCaptureFixture):
    with (
        grpc_server({"ModelConfig": WRONG_CONFIG[case]}) as url,
        open_connection(url, TIMEOUT_S) as connection,
    ):
        assert error_of(lambda: read_info(connection)).kind in ("failed", "refused")
        record = check(connection)
        assert record.live
        assert not record.healthy
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR and each.exc_info]


def test_an_enumeration_of_a_newer_server():
    newer = config_with(lambda config: config.input.add(name="x", dims=[1], data_type=99))
    with grpc_server({"ModelConfig": newer}) as url, open_connection(url) as connection:
        assert connection.model_config("sampler").get("input", [])[-1].get("data_type") == "99"


IMAGE = ARRAYS["image"].tobytes()
WRONG_INFER: dict[str, Handler] = {
    "empty": lambda *_: b"",
    "garbage": lambda *_: b"\xff" * 40,
    "missing": lambda *_: message_of(["step"]),
    "type": lambda *_: message_of(["image", "step"], image=("FP7", [1, 2, 2, 1], IMAGE)),
    "strings": lambda *_: message_of(["image", "step"], image=("BYTES", [1, 2, 2, 1], IMAGE)),
    "negative": lambda *_: message_of(["image", "step"], image=("UINT8", [-1, -2, 2, 1], IMAGE)),
    "minus four": lambda *_: message_of(["image", "step"], image=("UINT8", [-4], IMAGE)),
    "huge": lambda *_: message_of(["image", "step"], image=("UINT8", [2**62] * 9, IMAGE)),
    "flat": lambda *_: message_of(["image", "step"], image=("UINT8", [4], IMAGE)),
    "short": lambda *_: message_of(["image", "step"], image=("UINT8", [1, 2, 2, 1], IMAGE[1:])),
    "long": lambda *_: message_of(["image", "step"], image=("UINT8", [1, 2, 2, 1], IMAGE * 2)),
    "nothing": lambda *_: message_of(["image", "step"], image=("UINT8", [0, 2, 2, 1], b"")),
    "rows": lambda *_: message_of(["image", "step"], image=("UINT8", [2, 2, 1, 1], IMAGE)),
}


@pytest.mark.parametrize("case", WRONG_INFER)
def test_a_result_of_another_form(case: str):
    with (
        grpc_server({"ModelInfer": WRONG_INFER[case]}) as url,
        open_connection(url, TIMEOUT_S) as connection,
    ):
        assert error_of(lambda: ask_for_image(connection)).kind == "failed"


def test_a_huge_message_is_refused(monkeypatch: pytest.MonkeyPatch):
    limit = "grpc.max_receive_message_length"
    channel = dict(grpc_connection._CHANNEL)
    assert channel[limit] == MAX_TENSOR_BYTES
    monkeypatch.setattr(grpc_connection, "_CHANNEL", list((channel | {limit: 1 << 20}).items()))
    huge = bytes((1 << 20) + 1)
    special = {"ModelInfer": lambda *_: message_of(["image"], image=("UINT8", [1], huge))}
    with grpc_server(special) as url, open_connection(url, 20) as connection:
        error = error_of(lambda: ask_for_image(connection))
    assert error.kind == "failed"
    assert "larger than max" in str(error)


def test_a_compressed_message_is_refused():
    bomb = message_of(["image"], image=("UINT8", [1], bytes(32 << 20)))
    with (
        grpc_server({"ModelInfer": lambda *_: bomb}, compression=grpc.Compression.Gzip) as url,
        open_connection(url, 5) as connection,
    ):
        assert "ompress" in str(error_of(lambda: ask_for_image(connection)))


def hang(_request: bytes, context: Any) -> Any:
    while context.is_active():
        time.sleep(0.02)
    return b""


def hang_stream(request: bytes, context: Any) -> Iterator[Any]:
    yield hang(request, context)


def preview(step: int, *, last: bool = False) -> Any:
    infer = message_of(["image", "step"], step=("INT32", [1, 1], np.int32(step).tobytes()))
    infer.parameters["triton_final_response"].bool_param = last
    return messages.ModelStreamInferResponse(infer_response=infer)


def endless(_request: bytes, context: Any) -> Iterator[Any]:
    while context.is_active():
        yield preview(1)


def empty(_request: bytes, context: Any) -> Iterator[Any]:
    while context.is_active():
        yield messages.ModelStreamInferResponse()


def aborted(_request: bytes, context: Any) -> Iterator[Any]:
    yield preview(1)
    context.abort(grpc.StatusCode.INTERNAL, "a\x1b[31m\nb" * 4000)


STREAMS: dict[str, tuple[Handler, str]] = {
    "hangs": (hang_stream, "timeout"),
    "empty": (empty, "timeout"),
    "the same step again and again": (endless, "failed"),
    "backwards": (lambda *_: iter([preview(3), preview(2)]), "failed"),
    "beyond": (lambda *_: iter([preview(3), preview(99)]), "failed"),
    "ends early": (lambda *_: iter([preview(3, last=True)]), "failed"),
    "ends at once": (lambda *_: iter([]), "failed"),
    "garbage": (lambda *_: iter([b"\xff" * 40]), "failed"),
    "error": (aborted, "failed"),
    "message": (
        lambda *_: iter([messages.ModelStreamInferResponse(error_message="x\ny" * 9999)]),
        "failed",
    ),
}


@pytest.mark.parametrize("case", STREAMS)
def test_a_stream_of_another_form(case: str):
    handler, kind = STREAMS[case]

    def streaming(config: Any) -> None:
        config.model_transaction_policy.decoupled = True

    special = {"ModelConfig": config_with(streaming), "ModelStreamInfer": handler}
    with grpc_server(special) as url, open_connection(url, TIMEOUT_S) as connection:
        info = read_info(connection)
        inputs = make_inputs(info, label=1)
        error = error_of(lambda: list(responses(connection, info, inputs, ["image"])))
        assert error.kind == kind


@pytest.mark.parametrize("method", ["ServerLive", "ModelConfig", "ModelInfer", "RepositoryIndex"])
def test_a_call_that_hangs(method: str):
    with grpc_server({method: hang}) as url, open_connection(url, TIMEOUT_S) as connection:
        assert not check(connection).healthy
        if method in ("ModelConfig", "ModelInfer"):
            assert error_of(lambda: ask_for_image(connection)).kind == "timeout"


def drip_frames(client: socket.socket, _path: str) -> None:
    client.sendall(b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")  # settings, then bytes of a frame
    for _ in range(200):
        client.sendall(b"\x00")
        time.sleep(0.05)


SOCKETS: dict[str, Answer] = {
    "nothing": lambda client, _: [client.recv(1 << 16) for _ in range(100)] and None,
    "bytes now and then": drip_frames,
    "a reset": lambda client, _: client.close(),
    "HTTP/1": lambda client, _: client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "noise": lambda client, _: client.sendall(gzip.compress(bytes(1000)) * 100),
}


@pytest.mark.parametrize("case", SOCKETS)
def test_a_server_that_is_no_grpc(case: str):
    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                clients.append(client)
                threads.append(threading.Thread(target=serve, args=(client,)))
                threads[-1].start()

    def serve(client: socket.socket) -> None:
        with suppress(OSError), client:
            SOCKETS[case](client, "")

    clients: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads = [threading.Thread(target=accept)]
        threads[0].start()
        url = f"grpc://127.0.0.1:{listener.getsockname()[1]}"
        with open_connection(url, TIMEOUT_S) as connection:
            assert error_of(connection.is_server_live).kind in ("timeout", "unreachable", "failed")
        done = CliRunner().invoke(main, ["health", "--url", url, "--timeout", "0.5"])
        assert done.exit_code == 1
        assert len(done.stderr.splitlines()) == 1
        for each in (listener, *clients):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


def test_an_aborted_call_ends_at_once():
    with grpc_server({"ModelConfig": hang}) as url, open_connection(url, 30) as connection:
        threading.Timer(0.2, connection.abort).start()
        error_of(lambda: connection.model_config("sampler"))
        error_of(lambda: connection.model_config("sampler"))
        error_of(lambda: list(connection.stream("sampler", {}, [])))
