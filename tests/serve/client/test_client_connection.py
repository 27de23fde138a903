"""HTTP and gRPC give the same arrays, the same JSON and the same errors."""

import http.server
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serve.client.conftest import RAISING_SEED, SLOW_SEED, Fake
from treeq_export.client.connection import Connection, parse_url
from treeq_export.client.open import open_connection
from treeq_export.errors import ServeError

pytestmark = pytest.mark.triton
Connect = Callable[..., Connection]
PROTOCOLS = ("http", "grpc")


def rows(labels: list[int], seeds: list[int], **others: Any) -> dict[str, Any]:
    return {
        "label": np.array(labels, np.int32)[:, None],
        "seed": np.array(seeds, np.int64)[:, None],
        **others,
    }


def error_of(call: Callable[[], Any]) -> tuple[str, str]:
    """Return kind and line of the error, without the URL."""
    with pytest.raises(ServeError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    return caught.value.kind, line.split(": ", 1)[1]


def test_both_protocols_give_equal_arrays(connect: Connect):
    outputs = ["latents", "image", "step"]
    first, second = (
        connect(protocol).infer("sampler", rows([3, 4], [1, 2]), outputs) for protocol in PROTOCOLS
    )
    assert list(first) == list(second) == outputs
    for name in outputs:
        assert first[name].dtype == second[name].dtype
        np.testing.assert_array_equal(first[name], second[name])
        first[name][:] = 0  # a copy of one's own
    assert second["latents"].shape == (2, 1, 8, 8)
    alone = connect("http").infer("sampler", rows([4], [2]), ["latents"])["latents"]
    np.testing.assert_array_equal(alone, second["latents"][1:])


@pytest.mark.parametrize("model", ["sampler", "stream", "text", "denoiser"])
def test_both_protocols_give_equal_configurations_and_statistics(connect: Connect, model: str):
    over_http, over_grpc = connect("http"), connect("grpc")
    assert over_http.model_config(model) == over_grpc.model_config(model)
    assert over_http.models() == over_grpc.models()
    over_http.infer("sampler", rows([0], [0]), ["step"])
    statistics = over_http.statistics(model)
    while statistics != (now := over_http.statistics(model)):  # counted shortly after the answer
        statistics = now
    assert statistics == over_grpc.statistics(model)
    if model == "sampler":
        assert statistics["model_stats"][0]["inference_count"] > 0


UNKNOWN = (
    "Request for unknown model: 'nope' is not found. "
    "The server has denoiser, large, sampler, stream, text."
)
NO_TYPE = (
    "received dtype complex128, which Triton does not have. Convert it to the data type in the "
    "model's config.pbtxt."
)
REFUSED: dict[str, tuple[Callable[[Connection], Any], str]] = {
    "label": (
        lambda c: c.infer("sampler", rows([12], [0]), ["step"]),
        "sampler: label: received 12, expected 0..9.",
    ),
    "batch": (
        lambda c: c.infer("sampler", rows([1] * 5, [0] * 5), ["step"]),
        "inference request batch-size must be <= 4 for 'sampler'.",
    ),
    "type": (
        lambda c: c.infer("sampler", rows([1], [0], seed=np.zeros((1, 1), np.int32)), ["step"]),
        "inference input 'seed' data-type is 'INT32', but model 'sampler' expects 'INT64'.",
    ),
    "model": (
        lambda c: c.infer("nope", rows([1], [0]), ["step"]),
        UNKNOWN,
    ),
    "configuration": (
        lambda c: c.model_config("nope"),
        UNKNOWN,
    ),
    "output": (
        lambda c: c.infer("sampler", rows([1], [0]), ["nope"]),
        "unexpected inference output 'nope' for model 'sampler'.",
    ),
    "dtype": (
        lambda c: c.infer("sampler", rows([1], [0], guidance=np.zeros((1, 1), complex)), ["step"]),
        NO_TYPE,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_refused_request(connect: Connect, protocol: str, case: str):
    call, line = REFUSED[case]
    connection = connect(protocol)
    assert error_of(lambda: call(connection)) == ("refused", line)
    assert connection.infer("sampler", rows([1], [0]), ["step"])["step"] == 20  # still alive


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_exception_of_the_model_is_one_line(connect: Connect, protocol: str):
    connection = connect(protocol)
    kind, line = error_of(lambda: connection.infer("sampler", rows([1], [RAISING_SEED]), ["step"]))
    assert kind == "failed"
    assert line.endswith("message: ValueError: raised on purpose.")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_decoupled_model_refuses_infer(connect: Connect, protocol: str):
    kind, line = error_of(
        lambda: connect(protocol).infer("stream", rows([1], [0]), ["step"]),
    )
    assert kind == "refused"
    assert line.endswith("decoupled transaction policy. It streams: use grpc:// and `stream`.")


def test_a_slow_answer_is_a_timeout_and_the_connection_goes_on(connect: Connect):
    lines = set()
    for protocol in PROTOCOLS:
        connection = connect(protocol, timeout_s=0.15)
        slow = error_of(lambda c=connection: c.infer("sampler", rows([1], [SLOW_SEED]), ["step"]))
        lines.add(slow)
        connection = connect(protocol)
        assert connection.infer("sampler", rows([1], [0]), ["step"])["step"] == 20
    (line,) = lines
    assert line[0] == "timeout"
    assert line[1].startswith("no answer within 0.15 s. Raise --timeout")


def test_a_stream_yields_previews_and_the_result(connect: Connect):
    connection = connect("grpc")
    every = {"preview_every": np.array([[5]], np.int32)}
    got = list(connection.stream("stream", rows([1], [2]) | every, ["step", "latents"]))
    assert [int(response["step"][0, 0]) for response in got] == [5, 10, 15, 20]
    plain = connection.infer("sampler", rows([1], [2]), ["latents"])["latents"]
    np.testing.assert_array_equal(got[-1]["latents"], plain)
    stream = connection.stream("stream", rows([1], [2]) | every, ["step"])
    assert next(stream)["step"] == 5
    stream.close()  # an abandoned one ends
    only = list(connection.stream("sampler", rows([1], [2]), ["step"]))
    assert len(only) == 1


def test_errors_of_streams(connect: Connect):
    connection, quick = connect("grpc"), connect("grpc", timeout_s=0.15)
    stream = connection.stream
    assert error_of(lambda: list(stream("stream", rows([12], [0]), ["step"]))) == (
        "refused",
        "sampler: label: received 12, expected 0..9.",
    )
    assert error_of(lambda: list(stream("nope", rows([1], [0]), ["step"])))[0] == "refused"
    raising = rows([1], [RAISING_SEED])
    assert error_of(lambda: list(stream("stream", raising, ["step"])))[0] == "failed"
    slow = rows([1], [SLOW_SEED])
    assert error_of(lambda: list(quick.stream("stream", slow, ["step"])))[0] == "timeout"
    kind, line = error_of(lambda: list(connect("http").stream("stream", slow, ["step"])))
    assert kind == "refused"
    assert line.startswith("stream: HTTP cannot stream. Use grpc://127.0.0.1:PORT")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_unloading_and_loading(connect: Connect, protocol: str):
    connection = connect(protocol)
    assert connection.is_model_ready("large")
    connection.unload("large")
    assert not connection.is_model_ready("large")
    assert connection.is_server_live()
    kind, line = error_of(lambda: connection.infer("large", rows([1], [0]), ["step"]))
    assert kind == "refused"
    assert line == (
        "Request for unknown model: 'large' has no available versions. "
        "The server has denoiser, sampler, stream, text."
    )
    connection.load("large")
    assert connection.is_model_ready("large")
    assert connection.is_server_ready()
    assert error_of(lambda: connection.load("nope"))[0] == "failed"


def test_a_connection_goes_from_thread_to_thread_and_leaves_nothing(fake: Fake):
    open_files = Path("/proc/self/fd")

    def use(connection: Connection) -> None:
        connection.infer("sampler", rows([1], [0]), ["step"])

    with open_connection(fake.http) as connection:
        use(connection)
        before = len(list(open_files.iterdir()))
        for _ in range(10):  # tritonclient's own HTTP client leaves two files for each thread
            thread = threading.Thread(target=use, args=(connection,))
            thread.start()
            thread.join()
        assert len(list(open_files.iterdir())) <= before + 2  # not 20 more
    connection.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_server(protocol: str):
    with open_connection(f"{protocol}://127.0.0.1:{free_port()}", 5) as connection:
        assert error_of(connection.is_server_live) == (
            "unreachable",
            "not reached (Connection refused). Start the server, or name its address by --url.",
        )


def test_the_port_of_the_other_protocol(fake: Fake):
    for url in (fake.grpc.replace("grpc", "http"), fake.http.replace("http", "grpc")):
        with open_connection(url, 5) as connection:
            assert error_of(connection.is_server_live)[0] == "unreachable"


class AnotherServer(http.server.BaseHTTPRequestHandler):
    """Answers everything with a page, closes after each answer, and keeps the last headers."""

    protocol_version = "HTTP/1.1"
    seen: dict[str, Any]

    def do_GET(self) -> None:
        type(self).seen = {"path": self.path, **dict(self.headers)}
        self.send_response(200)
        self.send_header("Content-Length", "6")
        self.end_headers()
        self.wfile.write(b"<html>")
        self.close_connection = True  # unannounced: the client has to notice by itself

    do_POST = do_GET  # noqa: N815

    def log_message(self, *args: Any) -> None:
        pass


def test_another_server_a_path_and_a_password():
    with http.server.HTTPServer(("127.0.0.1", 0), AnotherServer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://me:se%20cret@127.0.0.1:{server.server_port}/triton/"
        try:
            with open_connection(url) as connection:
                assert connection.url == f"http://127.0.0.1:{server.server_port}/triton"
                assert connection.is_server_live()
                assert connection.is_server_ready()  # on a new socket
                assert AnotherServer.seen["path"] == "/triton/v2/health/ready"
                assert AnotherServer.seen["Authorization"] == "Basic bWU6c2UgY3JldA=="
                for call in (
                    connection.models,
                    lambda: connection.infer("sampler", rows([1], [0]), ["step"]),
                ):
                    kind, line = error_of(call)
                    assert kind == "failed"
                    assert line.startswith("received '<html>', expected Triton's JSON.")
        finally:
            server.shutdown()
            thread.join()


def test_a_password_over_grpc_does_no_harm(fake: Fake):
    with open_connection(fake.grpc.replace("//", "//me:secret@")) as connection:
        assert connection.is_server_live()
        assert connection.url == fake.grpc


@pytest.mark.parametrize("url", ["https://x", "http://", "x:y", "http://[bad", "ftp://me:pw@x"])
def test_a_malformed_url(url: str):
    with pytest.raises(ServeError, match=r"^url: received .*, expected http://host:port") as caught:
        open_connection(url)
    assert "pw" not in str(caught.value)


def test_an_ipv6_address():
    address = parse_url("grpc://[::1]")
    assert (address.host, address.target, address.url) == ("::1", "[::1]:8001", "grpc://[::1]:8001")


def test_a_timeout_has_to_be_positive():
    with pytest.raises(ServeError, match=r"^timeout_s: received 0"):
        open_connection("x", timeout_s=0)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_without_tritonclient(monkeypatch: pytest.MonkeyPatch, protocol: str):
    for name in list(sys.modules):
        if name.startswith(("tritonclient", f"treeq_export.client.{protocol}_")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    with pytest.raises(ServeError, match=r"pip install 'treeq-export\[serve\]'$"):
        open_connection(f"{protocol}://x")
