"""Ready is not healthy: a real inference says so, and reloading heals."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.serve.client.conftest import Fake
from treeq_export.cli import client as client_command
from treeq_export.cli import main
from treeq_export.client.connection import Connection
from treeq_export.client.health import check, check_and_heal, heal
from treeq_export.records.health import HealthRecord

pytestmark = pytest.mark.triton
Connect = Callable[..., Connection]


def health(*args: object) -> Result:
    return CliRunner().invoke(main, ["health", *map(str, args)])


def healthy_models(record: HealthRecord) -> dict[str, bool]:
    return {model.name: model.healthy for model in record.models}


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_healthy_server(connect: Connect, fake: Fake, protocol: str):
    record = check(connect(protocol))
    assert record.healthy
    assert (record.live, record.ready, record.error) == (True, True, None)
    sampler, denoiser = record.models
    assert (sampler.name, sampler.ready) == ("sampler", True)
    assert sampler.received == "latents float32 (1, 1, 8, 8), step int32 (1, 1)"
    assert denoiser.received == "prediction float32 (1, 1, 8, 8)"
    assert sampler.latency_ms is not None
    done = health("--url", getattr(fake, protocol))
    assert done.exit_code == 0
    assert done.stdout.startswith(f"{getattr(fake, protocol)}: healthy: sampler ")
    shown = json.loads(health("--url", getattr(fake, protocol), "--json").stdout)
    assert shown["healthy"] is True
    assert HealthRecord.model_validate({k: v for k, v in shown.items() if k != "healthy"}).healthy


def test_samplers_of_other_kinds(connect: Connect):
    assert check(connect("http"), "text").healthy  # conditioning of zeros
    assert check(connect("grpc"), "stream").healthy
    over_http = check(connect("http"), "stream").models[0]
    assert not over_http.healthy
    assert "HTTP cannot stream" in over_http.received
    other = check(connect("http"), "nope").models[0]
    assert (other.ready, other.healthy) == (False, False)
    assert other.received.startswith("Request for unknown model: 'nope' is not found.")


def test_a_killed_process_is_ready_and_not_healthy_until_it_is_healed(connect: Connect, fake: Fake):
    connection = connect("http")
    fake.kill("sampler")
    record = check(connection)
    assert (record.live, record.ready, record.models[0].ready) == (True, True, True)
    assert healthy_models(record) == {"sampler": False, "denoiser": True}
    assert "Stub process 'sampler_0_0' is not healthy" in record.summary()
    done = health("--url", fake.http)
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"treeq-export: {connection.url}: sampler (ready: yes): Stub process")
    assert f"`treeq-export health --url {connection.url} --heal`" in line
    healed = check_and_heal(connection)
    assert healed.healthy
    assert healed.reloaded == ["sampler"]
    assert healed.summary().endswith("; reloaded sampler")
    assert check_and_heal(connection).reloaded == []  # nothing to do


def test_all_processes_killed_and_healed_in_order(connect: Connect, fake: Fake):
    fake.kill("denoiser")
    fake.kill("sampler")
    done = health("--url", fake.grpc, "--heal", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["reloaded"] == ["denoiser", "sampler"]
    assert check(connect("http")).healthy


def test_an_unloaded_model_is_not_healthy_and_loaded_again(connect: Connect):
    connection = connect("http")
    connection.unload("sampler")
    record = check(connection)
    assert healthy_models(record) == {"sampler": False, "denoiser": True}
    assert record.models[0].ready is False
    assert heal(connection, ["sampler"]).healthy


def test_nan_is_not_healthy(connect: Connect, fake: Fake):
    flag = fake.flag("denoiser", "nan")
    flag.touch()
    try:
        record = check(connect("grpc"))
        assert healthy_models(record) == {"sampler": True, "denoiser": False}
        assert record.models[1].received == (
            "prediction: NaN, infinity or nothing, expected finite numbers"
        )
    finally:
        flag.unlink()


def test_what_cannot_be_healed_says_why(connect: Connect, fake: Fake):
    flag = fake.flag("sampler", "broken")
    flag.touch()
    try:
        record = heal(connect("http"), ["sampler"])
        assert not record.healthy
        assert record.reloaded == []
        assert record.error is not None
        assert record.error.startswith("cannot be healed: ")
        assert "broken on purpose" in record.error
    finally:
        flag.unlink()
        assert check_and_heal(connect("http")).healthy


@contextmanager
def relay(port: int, target: str) -> Iterator[None]:
    """Pass connections of a port on to a server, until the block ends."""
    host, target_port = target.split("//")[1].split(":")
    pipes: list[socket.socket] = []
    listener = socket.create_server(("127.0.0.1", port), reuse_port=True)

    def copy(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection((host, int(target_port)))
                pipes.extend((client, server))
                for ends in ((client, server), (server, client)):
                    thread = threading.Thread(target=copy, args=ends)
                    thread.start()
                    threads.append(thread)

    threads = [threading.Thread(target=accept)]
    threads[0].start()
    try:
        yield
    finally:
        for each in (listener, *pipes):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        for each in (listener, *pipes):
            each.close()


@contextmanager
def ended(process: "subprocess.Popen[str]") -> Iterator[None]:
    """Kill a process that outlives the block: else a failed test would wait for its end."""
    try:
        yield
    finally:
        process.kill()


@pytest.mark.parametrize(("protocol", "end"), [("http", signal.SIGINT), ("grpc", signal.SIGTERM)])
def test_watching_copes_with_a_server_that_goes_and_comes(
    fake: Fake, protocol: str, end: signal.Signals
):
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "treeq_export.cli", "health", "--json", "--heal"]
    command += ["--url", f"{protocol}://127.0.0.1:{port}", "--watch", "0.1", "--timeout", "5"]
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
        ) as process,
        ended(process),
    ):
        assert process.stdout is not None
        assert process.stderr is not None

        def next_line() -> dict[str, Any]:
            assert process.stdout is not None
            return json.loads(process.stdout.readline())

        down = next_line()
        assert down["healthy"] is False
        assert down["live"] is None
        assert down["error"].startswith("not reached (Connection refused)")
        with relay(port, getattr(fake, protocol)):
            up = next_line()
            assert up["healthy"] is True
            assert up["error"] is None
            if protocol == "grpc":
                fake.kill("sampler")
                healed = next_line()
                assert (healed["healthy"], healed["reloaded"]) == (True, ["sampler"])
        gone = next_line()
        assert gone["healthy"] is False
        if not gone["error"] or "Connection refused" not in gone["error"]:
            gone = next_line()  # the relay ended in the middle of a check
        assert "Connection refused" in gone["error"]
        time.sleep(0.3)  # no line without a change
        process.send_signal(end)
        rest, errors = process.communicate(timeout=10)
        assert (process.returncode, rest, errors) == (0, "", "")


def test_watching_in_words(fake: Fake, monkeypatch: pytest.MonkeyPatch):
    # Ctrl-C in the middle of the first check.
    ask = client_command._check

    def check_and_interrupt(*arguments: Any) -> HealthRecord:
        signal.raise_signal(signal.SIGINT)
        return ask(*arguments)

    monkeypatch.setattr(client_command, "_check", check_and_interrupt)
    handler = signal.getsignal(signal.SIGINT)
    done = health("--url", fake.http, "--watch", 5)
    assert done.exit_code == 0
    assert f" {fake.http}: healthy: sampler " in done.stdout
    down = health("--url", "127.0.0.1:1", "--watch", 5)
    assert " http://127.0.0.1:1: NOT HEALTHY: not reached (Connection refused)" in down.stdout
    assert signal.getsignal(signal.SIGINT) is handler
