"""The page beside a server that misbehaves, and before clients that do."""

import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.serve.client.conftest import RunningPage
from tests.serve.client.fake_servers import (
    CONFIG,
    drip,
    flood,
    http_answer,
    http_server,
    infer_answer,
    outputs_of,
)
from treeq_export.client import web, web_limits
from treeq_export.client.side_car import SideCar

TIMEOUT_S = 0.5


@contextmanager
def page_of(url: str, timeout_s: float = TIMEOUT_S) -> Iterator[str]:
    page = RunningPage(SideCar(url, timeout_s=timeout_s))
    try:
        yield page.url
    finally:
        begin = time.monotonic()
        page.close()
        assert time.monotonic() - begin < 5


def ask(url: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
    """Return status, JSON and headers."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | headers
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.load(response), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error), error.headers


def test_the_page_of_a_right_server():
    with http_server() as server, page_of(server) as url:
        assert ask(f"{url}healthz")[0] == 200
        assert ask(f"{url}api/model")[1]["model"] == "digits"
        status, answer, _ = ask(f"{url}api/image", {"label": 1, "seed": 3})
        assert (status, answer["step"], answer["width"]) == (200, 4, 2)


HOSTILE: dict[str, bytes] = {
    "list": http_answer([]),
    "null": http_answer(None),
    "deep": http_answer(b"[" * 100_000),
    "parameters": http_answer({"parameters": None}),
    "gateway": http_answer({"error": {"code": 503}}, "503 Busy"),
    "page": http_answer(b"<html>"),
    "no sampler": http_answer({}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_server_that_is_not_triton(case: str, caplog: pytest.LogCaptureFixture):
    with http_server({"": HOSTILE[case]}) as server, page_of(server) as url:
        status, answer, _ = ask(f"{url}api/model")
        assert status == (400 if case == "no sampler" else 502)
        assert isinstance(answer["error"], str)
        assert ask(f"{url}api/image", {"label": 1})[0] == status
        status, answer, _ = ask(f"{url}healthz")
        assert (status, answer["healthy"]) == (503, False)
    assert not caplog.records


@pytest.mark.parametrize(
    "answer",
    [
        infer_answer(outputs_of(["image", "step"]), b""),
        infer_answer(outputs_of(["image", "step"], image={"shape": [1, 0, 0, 1]}), b""),
        flood(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999\r\n\r\n"),
    ],
)
def test_an_image_that_is_none(answer: Any):
    with http_server({"/infer": answer}) as server, page_of(server) as url:
        assert ask(f"{url}api/image", {"label": 1})[0] == 502


def test_a_strip_is_not_enlarged_without_end():
    strip = [{"name": "image", "data_type": "TYPE_UINT8", "dims": [1, 40000, 1]}, *CONFIG["output"]]
    config = http_answer(CONFIG | {"output": [strip[0], strip[1], strip[3]]})
    outputs = outputs_of(["image", "step"])
    outputs[0] |= {"shape": [1, 1, 40000, 1], "parameters": {"binary_data_size": 40000}}
    image = infer_answer(outputs, bytes(40000) + b"\x04\0\0\0")
    with http_server({"/config": config, "/infer": image}) as server, page_of(server) as url:
        assert ask(f"{url}api/image", {"label": 1})[0] == 200


def test_a_server_that_drips_wedges_nothing():
    exchange: dict[str, Any] = {"": drip}
    with http_server(exchange) as server, page_of(server) as url:
        paths = ["api/model"] * 12 + ["healthz"] * 12
        found: list[int] = []
        threads = [
            threading.Thread(target=lambda path=path: found.append(ask(url + path)[0]))
            for path in paths
        ]
        begin = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - begin < TIMEOUT_S + 2
        assert sorted(found) == [503] * 12 + [504] * 12
        exchange.clear()
        assert ask(f"{url}api/model")[0] == 200
        assert ask(f"{url}healthz")[0] == 200


def test_health_is_not_behind_images(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(web, "_NUM_AT_WORK", 2)
    monkeypatch.setattr(web, "_NUM_WAITING", 2)
    exchange: dict[str, Any] = {"/infer": drip}
    with http_server(exchange) as server, page_of(server, 1.0) as url:
        found: list[tuple[int, Any, Any]] = []
        threads = [
            threading.Thread(target=lambda: found.append(ask(f"{url}api/image", {"label": 1})))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.4)
        assert ask(f"{url}api/model")[0] == 200
        del exchange["/infer"]
        assert ask(f"{url}healthz")[0] == 200
        for thread in threads:
            thread.join()
    busy = [headers for status, _, headers in found if status == 503]
    assert len(busy) >= 4  # two at work, two that waited
    assert all(headers["Retry-After"] == "5" for headers in busy)
    assert sum(status == 504 for status, _, _ in found) >= 2


HOSTS = [
    ("127.0.0.1", True),
    ("localhost:8080", True),
    ("LOCALHOST", True),
    ("[::1]:8080", True),
    ("10.1.2.3:99", True),
    ("gpu-7.example:8080", True),
    ("evil.example", False),
    ("localhost.evil.example", False),
    ("127.0.0.1.evil.example", False),
    ("evil.example:80@localhost", False),
    ("[evil]", False),
    ("", False),
    ("a b", False),
]


@pytest.mark.parametrize(("host", "allowed"), HOSTS)
def test_the_name_of_the_page(host: str, allowed: bool):
    limits = web_limits.Limits("127.0.0.1", ["gpu-7.example"])
    if allowed:
        limits._check_host(host)
    else:
        with pytest.raises(web_limits.RefusedError, match=r"^Host: received .* --allow-host NAME"):
            limits._check_host(host)
    web_limits.Limits("127.0.0.1", ["*"])._check_host(host)


@pytest.mark.parametrize("path", ["", "api/model", "healthz", "nope"])
def test_a_foreign_name_is_refused(path: str):
    with http_server() as server, page_of(server) as url:
        status, answer, headers = ask(url + path, Host="evil.example")
        assert status == 403
        assert "--allow-host" in answer["error"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"[" * 60_000, {}, 400),
        (b'{"seed": ' + b"9" * 5000 + b"}", {}, 400),
        (b'{"seed": 1e400}', {}, 400),
        (b'{"a\\nb\\u001b": 1}', {}, 400),
        (b'{"guidance": NaN, "label": 1}', {}, 400),
        (b"\xff", {}, 400),
        (b"{}", {"Content-Encoding": "gzip"}, 400),
        (b"x" * 70_000, {}, 413),
        (b"{}", {"Content-Type": "text/plain"}, 415),
        ({"label": 1, "seed": -1}, {}, 400),
        ({"label": 1, "steps": 2**40}, {}, 400),
    ],
)
def test_a_request_that_is_refused(body: Any, headers: dict[str, str], status: int):
    with http_server() as server, page_of(server) as url:
        found, answer, _ = ask(f"{url}api/image", body, **headers)
        assert found == status
        assert isinstance(answer["error"], str)
        assert answer["error"].isprintable()


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").rstrip("/").split(":")
    return socket.create_connection((host, int(port)), 5)


HALF: dict[str, bytes] = {
    "nothing": b"",
    "half a line": b"GET / HT",
    "half a head": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ",
    "half a body": b"POST /api/image HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20\r\n"
    b"Content-Type: application/json\r\n\r\n{",
    "half a chunk": b"POST /api/image HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    b"Content-Type: application/json\r\n\r\n5\r\n{",
    "half a second one": b"GET /nope HTTP/1.1\r\nHost: localhost\r\n\r\nGET /",
}


@pytest.mark.parametrize("case", HALF)
def test_half_requests_are_not_held(case: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("_HEADERS_WITHIN_S", "_BODY_WITHIN_S", "_IDLE_S", "_LINGER_S"):
        monkeypatch.setattr(web_limits, name, 0.3)
    with http_server() as server, page_of(server) as url:
        clients = [connect(url) for _ in range(20)]
        for client in clients:
            client.sendall(HALF[case])
        assert ask(f"{url}healthz")[0] == 200
        for client in clients:
            with client:
                try:
                    while client.recv(4096):  # until it is closed, else a timeout of 5 s
                        pass
                except ConnectionResetError:
                    continue


def test_a_connection_too_many(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(web_limits, "_MAX_CONNECTIONS", 3)
    with http_server() as server, page_of(server) as url:
        clients = [connect(url) for _ in range(3)]
        time.sleep(0.1)
        with connect(url) as client:
            assert client.recv(4096).startswith(b"HTTP/1.1 503 ")
        for client in clients:
            client.close()
        time.sleep(0.1)
        assert ask(f"{url}healthz")[0] == 200


def is_closed_while_sending(client: socket.socket) -> bool:
    try:
        for _ in range(20_000):
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for _ in range(50):
            time.sleep(0.1)
            client.sendall(b"G")
    except ConnectionError:
        return True
    return False  # or a TimeoutError


def test_who_takes_no_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(web_limits, "_ANSWER_WITHIN_S", 0.3)
    with http_server() as server, page_of(server) as url, connect(url) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        assert is_closed_while_sending(client)
        assert ask(f"{url}healthz")[0] == 200


def test_lost_clients_and_noise_are_quiet(caplog: pytest.LogCaptureFixture):
    num = 20
    with http_server() as server, page_of(server) as url:
        for text in (*HALF.values(), b"\x16\x03\x01garbage\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
            for _ in range(num):
                with connect(url) as client:
                    client.sendall(text)
        time.sleep(0.3)
        assert ask(f"{url}healthz")[0] == 200
    lines = [record.getMessage() for record in caplog.records if record.levelno > logging.DEBUG]
    assert len(lines) <= 2 * num  # those that were noise
    assert all(record.exc_info is None for record in caplog.records)
    assert all(len(line.splitlines()) == 1 for line in lines)


def test_an_error_of_the_page_itself_is_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(_self: SideCar) -> None:
        raise ZeroDivisionError("on\npurpose")

    monkeypatch.setattr(SideCar, "describe", fail)
    with http_server() as server, page_of(server) as url:
        status, answer, _ = ask(f"{url}api/model")
    assert status == 500
    assert answer["error"].startswith("ZeroDivisionError: on purpose.")
    (record,) = caplog.records
    assert record.getMessage() == "GET /api/model: ZeroDivisionError: on purpose"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_in_seconds_whatever_hangs(number: signal.Signals):
    with http_server({"": drip}) as server:
        command = [sys.executable, "-W", "error", "-m", "treeq_export.cli", "web"]
        command += ["--url", server, "--port", "0", "--timeout", "60"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                url = process.stderr.readline().split()[0]
                asks: list[Callable[[], Any]] = [
                    lambda: ask(f"{url}healthz"),
                    lambda: ask(f"{url}api/model"),
                    *[lambda: ask(f"{url}api/image", {"label": 1})] * 12,
                ]
                threads = [threading.Thread(target=quietly, args=(each,)) for each in asks]
                for thread in threads:
                    thread.start()
                half = connect(url)
                half.sendall(HALF["half a body"])
                time.sleep(0.5)
                begin = time.monotonic()
                process.send_signal(number)
                assert process.wait(10) == 0
                assert time.monotonic() - begin < 6
                assert process.stderr.read() == ""
                for thread in threads:
                    thread.join()
                half.close()
            finally:
                process.kill()


def quietly(call: Callable[[], Any]) -> None:
    try:
        call()
    except OSError:
        return
