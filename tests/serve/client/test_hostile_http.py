"""What answers over HTTP is not always Triton: every answer ends in time, small, in one line."""

import json
import random
import resource
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests.serve.client.fake_servers import (
    ARRAYS,
    CONFIG,
    Answer,
    ask_for_image,
    drip,
    flood,
    http_answer,
    http_server,
    infer_answer,
    one_line_error,
    outputs_of,
)
from treeq_export.cli import main
from treeq_export.client.answers import CONFIG as CONFIG_FORM
from treeq_export.client.answers import read_json
from treeq_export.client.connection import Connection
from treeq_export.client.health import check
from treeq_export.client.http_connection import MAX_JSON_BYTES, MAX_TENSOR_BYTES, _read_outputs
from treeq_export.client.open import open_connection
from treeq_export.client.sampler import read_info

TIMEOUT_S = 0.5
SLACK_S = 1.0  # of a machine that does other things too
INPUTS = {"label": np.zeros((1, 1), np.int32), "seed": np.zeros((1, 1), np.int64)}
TENSORS = b"".join(ARRAYS[name].tobytes() for name in ("image", "step"))


error_of = partial(one_line_error, within_s=TIMEOUT_S + SLACK_S)


def command(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def test_the_fake_server_is_right():
    with http_server() as url, open_connection(url) as connection:
        assert ask_for_image(connection).arrays["image"].tolist() == ARRAYS["image"].tolist()
        assert connection.server_version() == "2.51"
        assert (
            connection.statistics("sampler").get("model_stats", [])[0].get("inference_count") == 3
        )
        assert check(connection).healthy


NOT_TRITON: dict[str, bytes] = {
    "list": b"[]",
    "null": b"null",
    "string": b'"x"',
    "number": b"17",
    "nothing": b"",
    "page": b"<html>",
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "digits": b'{"max_batch_size":' + b"9" * 5000 + b"}",
    "infinite": b'{"max_batch_size": 1e999}',
    "no text": b'{"name": "\xff"}',
    "half a surrogate": b'{"name": "\\ud800"}',
    "null parameters": b'{"parameters": null}',
    "list of parameters": b'{"parameters": []}',
    "parameter is a string": b'{"parameters": {"treeq_model": "x"}}',
    "input is a number": b'{"input": 3}',
    "input without name": b'{"input": [{"dims": [1]}]}',
    "negative dims": b'{"input": [{"name": "a", "dims": [-7]}]}',
    "huge dims": b'{"input": [{"name": "a", "dims": [99999999999]}]}',
    "many dims": b'{"input": [{"name": "a", "dims": [' + b"1," * 99 + b"1]}]}",
    "fraction": b'{"max_batch_size": 1.5}',
    "decoupled": b'{"model_transaction_policy": {"decoupled": "perhaps"}}',
}


@pytest.mark.parametrize("case", NOT_TRITON)
def test_a_configuration_of_another_form(case: str):
    with (
        http_server({"/config": http_answer(NOT_TRITON[case])}) as url,
        open_connection(url) as connection,
    ):
        error = error_of(lambda: connection.model_config("sampler"))
        assert error.kind == "failed"
        assert "expected Triton's JSON" in str(error)
        record = check(connection)  # goes on, and says so
        assert record.live
        assert not record.healthy
        assert "expected Triton's JSON" in record.summary()


def config_with(**changes: Any) -> bytes:
    return http_answer(CONFIG | changes)


def parameters(**changes: str) -> bytes:
    given = {f"treeq_{key}": {"string_value": value} for key, value in changes.items()}
    return config_with(parameters=CONFIG["parameters"] | given)


@pytest.mark.parametrize(
    "answer",
    [
        http_answer({}),
        config_with(parameters={}),
        parameters(steps="0"),
        parameters(steps="-4"),
        parameters(steps="9" * 5000),
        parameters(steps="1e3"),
        parameters(steps=str(2**31)),
        parameters(guidance="nan"),
        parameters(guidance="inf"),
        parameters(guidance="x"),
        parameters(num_classes="0"),
        parameters(num_classes="x"),
        config_with(output=[]),
        config_with(output=[{"name": "step", "dims": [2]}]),
    ],
)
def test_a_configuration_that_is_no_sampler(answer: bytes):
    with http_server({"/config": answer}) as url, open_connection(url) as connection:
        assert "no sampler of treeq-export" in str(error_of(lambda: read_info(connection)))
        assert not check(connection).healthy


def test_a_configuration_that_asks_for_huge_inputs():
    given = CONFIG["parameters"].copy()
    del given["treeq_num_classes"]
    huge = [{"name": "prompt", "dims": [2**31 - 1, 2**31 - 1]}, *CONFIG["input"][1:]]
    with (
        http_server({"/config": config_with(input=huge, parameters=given)}) as url,
        open_connection(url) as connection,
    ):
        assert "prompt: the model's configuration says shape" in check(connection).summary()


@pytest.mark.parametrize("path", ["/index", "/stats", "/v2"])
@pytest.mark.parametrize(
    "body", [b'"x"', b"[[]]", b"[" * 100_000, b'{"model_stats": [3], "version": 2}', b"7"]
)
def test_other_answers_of_another_form(path: str, body: bytes):
    asks: dict[str, Callable[[Connection], Any]] = {
        "/index": lambda connection: connection.models(),
        "/stats": lambda connection: connection.statistics("sampler"),
        "/v2": lambda connection: connection.server_version(),
    }
    with http_server({path: http_answer(body)}) as url, open_connection(url) as connection:
        assert error_of(lambda: asks[path](connection)).kind == "failed"


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        ("503 Busy", b'{"error": {"code": 503, "message": "restarting"}}', "HTTP status 503 Busy"),
        ("503 Busy", b'{"error": null}', "HTTP status 503 Busy"),
        ("500 No", b"[]", "HTTP status 500 No"),
        ("500 No", b'{"error": ["x"]}', "HTTP status 500 No"),
        ("500 No", b'{"error": "a\\u001b[31m\\nb"}', "a[31m b"),
        ("400 No", b"[" * 100_000, "HTTP status 400 No"),
        ("500 No", b'{"error": "' + b" " * 1_000_000 + b'x"}', "no message"),
        ("500 No", b'{"error": "' + b"y" * 1_000_000 + b'"}', "yyy (and more)."),
        ("302 Found", b"", "HTTP status 302 Found"),
        ("204 No", b"", "HTTP status 204 No"),
        ("999 \x1b[31m", b"{}", "HTTP status 999 [31m"),
    ],
)
def test_an_error_of_another_form(status: str, body: bytes, words: str):
    with (
        http_server({"/config": http_answer(body, status)}) as url,
        open_connection(url) as connection,
    ):
        error = error_of(lambda: connection.model_config("sampler"))
        assert words in str(error)
        assert error.kind == ("refused" if status.startswith("4") else "failed")


def test_a_server_that_knows_no_model_whatever_it_is_asked():
    answer = http_answer({"error": "unknown model"}, "404 Not Found")
    with http_server({"": answer}) as url, open_connection(url) as connection:
        for _ in range(2):
            error = error_of(lambda: connection.model_config("sampler"))
            assert str(error) == f"{url}: unknown model."
        assert check(connection).error == "unknown model."


def changed(**change: Any) -> list[dict[str, Any]]:
    return outputs_of(["image", "step"], image=change)


def without(key: str) -> list[dict[str, Any]]:
    outputs = outputs_of(["image", "step"])
    del outputs[0][key]
    return outputs


WRONG_INFER: dict[str, bytes] = {
    "no outputs": http_answer({"model_name": "sampler"}),
    "outputs null": http_answer({"outputs": None}),
    "list": http_answer([]),
    "missing output": infer_answer(outputs_of(["step"]), ARRAYS["step"].tobytes()),
    "unknown type": infer_answer(changed(datatype="FP7"), TENSORS),
    "strings": infer_answer(changed(datatype="BYTES"), TENSORS),
    "type is a number": infer_answer(changed(datatype=3), TENSORS),
    "other type": infer_answer(changed(datatype="INT64"), TENSORS),
    "negative shape": infer_answer(changed(shape=[-1, 2, 2, 1]), TENSORS),
    "huge shape": infer_answer(changed(shape=[2**31 - 1] * 16), TENSORS),
    "deep shape": infer_answer(changed(shape=[1] * 99), TENSORS),
    "other shape": infer_answer(changed(shape=[2, 1, 2, 1]), TENSORS),
    "flat": infer_answer(changed(shape=[4]), TENSORS),
    "empty": infer_answer(
        changed(shape=[1, 0, 0, 1], parameters={"binary_data_size": 0}), TENSORS[4:]
    ),
    "size lies up": infer_answer(changed(parameters={"binary_data_size": 400}), TENSORS),
    "size lies down": infer_answer(changed(parameters={"binary_data_size": 3}), TENSORS),
    "size negative": infer_answer(changed(parameters={"binary_data_size": -4}), TENSORS),
    "size is a string": infer_answer(changed(parameters={"binary_data_size": "x"}), TENSORS),
    "size huge": infer_answer(changed(parameters={"binary_data_size": 2**70}), TENSORS),
    "parameters null": infer_answer(changed(parameters=None), TENSORS),
    "truncated": infer_answer(outputs_of(["image", "step"]), TENSORS[:-1]),
    "no bytes": infer_answer(outputs_of(["image", "step"]), b""),
    "no values": infer_answer(without("parameters"), TENSORS[4:]),
    "values of another type": infer_answer(changed(parameters={}, data=["x"]), TENSORS[4:]),
    "values too large": infer_answer(changed(parameters={}, data=[300] * 4), TENSORS[4:]),
    "values too deep": infer_answer(changed(parameters={}, data=[[[1], 2], 3]), TENSORS[4:]),
    "header negative": infer_answer(outputs_of(["image", "step"]), TENSORS, size="-5"),
    "header no number": infer_answer(outputs_of(["image", "step"]), TENSORS, size="x"),
    "header of digits": infer_answer(outputs_of(["image", "step"]), TENSORS, size="9" * 5000),
    "header too long": infer_answer(outputs_of(["image", "step"]), TENSORS, size="999999"),
    "header too short": infer_answer(outputs_of(["image", "step"]), TENSORS, size="10"),
    "step is a float": infer_answer(
        outputs_of(["image", "step"], step={"datatype": "FP32"}), TENSORS
    ),
}


@pytest.mark.parametrize("case", WRONG_INFER)
def test_a_result_of_another_form(case: str):
    with (
        http_server({"/infer": WRONG_INFER[case]}) as url,
        open_connection(url, TIMEOUT_S) as connection,
    ):
        assert error_of(lambda: ask_for_image(connection)).kind == "failed"


def test_a_result_as_json_alone():
    outputs = [
        {key: value for key, value in each.items() if key != "parameters"}
        | {"data": ARRAYS[each["name"]].flatten().tolist()}
        for each in outputs_of(["image", "step"])
    ]
    with (
        http_server({"/infer": http_answer({"outputs": outputs})}) as url,
        open_connection(url) as connection,
    ):
        assert ask_for_image(connection).arrays["image"].tolist() == ARRAYS["image"].tolist()


def drip_headers(client: socket.socket, _path: str) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\n")
    for number in range(90):
        client.sendall(f"X-{number}: x\r\n".encode())
        time.sleep(0.05)


def say_nothing(client: socket.socket, _path: str) -> None:
    client.recv(1)  # until the client goes


def reset(client: socket.socket, _path: str) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS: dict[str, Answer] = {
    "a byte now and then": drip,
    "a header now and then": drip_headers,
    "nothing": say_nothing,
    "interim answers": flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 10),
    "empty chunk extensions": flood(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"1;" + b"x" * 60000 + b"\r\nx\r\n",
    ),
    "trailers": flood(CHUNKED + b"0\r\n", b"a: b\r\n"),
    "a body without length": flood(b"HTTP/1.1 200 OK\r\n\r\n"),
    "3 GiB of blanks": flood(b"HTTP/1.1 200 OK\r\nContent-Length: 3221225472\r\n\r\n"),
    "a chunk of everything": flood(CHUNKED + b"-1\r\n"),
    "a huge chunk": flood(CHUNKED + b"fffffffffffffff\r\n"),
    "a long header": flood(b"HTTP/1.1 200 OK\r\nX: "),
    "a long status": flood(b"HTTP/1.1 200 "),
    "a length that lies": lambda client, _: client.sendall(
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"
    ),
    "a reset": reset,
    "nothing at all": lambda client, _: None,
    "a length that is no number": flood(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"),
    "a compressed answer": lambda client, _: client.sendall(
        http_answer(b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
    ),
    "not HTTP": flood(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00", b"\x00"),
}


@pytest.mark.parametrize("path", ["/config", "/infer"])
@pytest.mark.parametrize("case", ENDLESS)
def test_an_answer_without_end(case: str, path: str):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (
        http_server({path: ENDLESS[case]}) as url,
        open_connection(url, TIMEOUT_S) as connection,
    ):
        error = error_of(lambda: ask_for_image(connection))
        assert error.kind in ("failed", "timeout", "unreachable")
    limit = MAX_JSON_BYTES if path == "/config" else MAX_TENSOR_BYTES
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < 2 * limit + (64 << 20)


def test_the_deadline_is_the_commands(tmp_path: Any):
    with http_server({"": drip}) as url:
        for args in (
            ("client", "--url", url, "--label", "1"),
            ("health", "--url", url),
            ("loadtest", "--url", url, "--out", str(tmp_path)),
        ):
            begin = time.monotonic()
            done = command(*args, "--timeout", "0.5")
            assert time.monotonic() - begin < TIMEOUT_S + SLACK_S
            assert done.exit_code == 1
            assert "no answer within 0.5 s" in done.stderr
            assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("value", ["inf", "nan", "0", "-1", "1e300"])
@pytest.mark.parametrize("name", ["client", "health", "web", "loadtest"])
def test_a_timeout_that_is_none(name: str, value: str):
    done = command(name, "--url", "127.0.0.1:1", "--timeout", value)
    assert done.exit_code == 1
    assert done.stderr.startswith("treeq-export: timeout_s: received ")


@pytest.mark.parametrize("value", ["inf", "nan", "0", "-1", "1e300"])
def test_an_interval_that_is_none(value: str):
    done = command("health", "--url", "127.0.0.1:1", "--watch", value)
    assert done.exit_code == 2
    assert "Invalid value for '--watch'" in done.stderr


@pytest.mark.parametrize("option", ["--out", "--latents"])
@pytest.mark.parametrize("value", ["", ".", "/", ".."])
def test_a_file_that_is_none(option: str, value: str):
    with http_server() as url:
        done = command("client", "--url", url, "--label", "1", option, value)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"treeq-export: {option}: received ")
    assert len(done.stderr.splitlines()) == 1


def test_an_aborted_exchange_ends_at_once():
    import threading

    with http_server({"": say_nothing}) as url, open_connection(url, 30) as connection:
        threading.Timer(0.1, connection.abort).start()
        error_of(lambda: connection.model_config("sampler"))
        error_of(lambda: connection.model_config("sampler"))  # and stays so


def test_a_stale_connection_is_opened_again_and_a_fresh_one_not_asked_twice():
    asked: list[str] = []

    def close(client: socket.socket, path: str) -> None:
        asked.append(path)

    with http_server({"/ready": close}) as url, open_connection(url, TIMEOUT_S) as connection:
        error_of(connection.is_server_ready)
        assert len(asked) == 1
        assert connection.models()
        error_of(connection.is_server_ready)
        assert len(asked) == 3


@pytest.mark.parametrize(
    ("version", "is_old"),
    [("2.51.0", True), ("1.0", True), ("2.70.0", False), ("2.73.0", False), ("3.0", False)],
)
def test_an_old_server_is_a_warning(version: str, is_old: bool):
    with http_server({"/v2": http_answer({"version": version})}) as url:
        done = command("health", "--url", url)
        assert done.exit_code == 0
        assert ("bulletin 5828" in done.stderr) == is_old
        shown = json.loads(command("health", "--url", url, "--json").stdout)
        assert shown["server_version"] == version


@pytest.mark.parametrize(
    "answer",
    [
        http_answer({}),
        http_answer({"version": "x\x1b[31m"}),
        http_answer([]),
        http_answer(b"", "404 No"),
        http_answer({"version": "9" * 5000}),
    ],
)
def test_a_version_that_is_none_is_no_warning(answer: bytes):
    with http_server({"/v2": answer}) as url:
        done = command("health", "--url", url)
    assert (done.exit_code, done.stderr) == (0, "")


def test_a_resolver_that_hangs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(1.2))
    with open_connection("http://somewhere.example", TIMEOUT_S) as connection:
        assert error_of(connection.is_server_live).kind == "timeout"


def test_a_name_that_is_not_known():
    with open_connection("http://no-such-host.invalid", 5) as connection:
        assert error_of(connection.is_server_live).kind == "unreachable"


@pytest.mark.parametrize("scheme", ["http", "grpc"])
@pytest.mark.parametrize("host", ["x" * 70, "a..b", ".", "[::1%lo]", "[fe80::1%nope]", "1.2.3.4.5"])
def test_a_host_that_is_none(scheme: str, host: str):
    done = command("health", "--url", f"{scheme}://{host}:1", "--timeout", "2")
    assert done.exit_code == 1
    assert len(done.stderr.splitlines()) == 1
    assert "not reached" in done.stderr or "no answer within" in done.stderr


@pytest.mark.parametrize(
    "url", ["http://a b", "http://h/ä", "http://h/a b", "http://\udcff", "http://h/\x7f", ""]
)
def test_a_url_that_cannot_be_asked(url: str):
    done = command("client", "--url", url, "--label", "1")
    assert done.exit_code == 1
    assert done.stderr.startswith("treeq-export: url: received ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("client", "--model", "\udcff", "--label", "1"),
        ("health", "--model", "a\nb"),
        ("loadtest", "--url", "x", "--model", "\udcff"),
        ("loadtest", "--url", "x", "--note", "\udcff"),
    ],
)
def test_text_that_cannot_be_sent(arguments: tuple[str, ...]):
    done = command(*arguments)
    assert done.exit_code == 2
    assert "expected printable characters." in done.stderr


@pytest.mark.parametrize("address", ["x" * 70, "no-such-host.invalid", "256.1.1.1"])
def test_an_address_that_cannot_be_listened_on(address: str):
    done = command("web", "--port", "0", "--address", address)
    assert done.exit_code == 1
    assert "cannot listen there" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_mutated_answers_are_lines():
    chance = random.Random(0)
    body = infer_answer(outputs_of(["image", "step"]), TENSORS)
    head, data = body.split(b"\r\n\r\n", 1)
    size = head.split(b"Inference-Header-Content-Length: ")[1].decode()
    pieces = [b"", b"0", b"-1", b"[", b"]", b'"', b"\xff", b"null", b"1e9", b"{}", b"\\u0000"]
    for text, read in (
        (data, lambda mutated: _read_outputs("sampler", mutated, size, ["image", "step"])),
        (json.dumps(CONFIG).encode(), lambda mutated: read_json(CONFIG_FORM, mutated)),
    ):
        num_read = 0
        for _ in range(400):
            mutated = bytearray(text)
            for _ in range(chance.randint(1, 3)):
                place = chance.randrange(len(mutated))
                mutated[place : place + chance.randint(0, 3)] = chance.choice(pieces)
            with suppress(ValueError):
                read(bytes(mutated))
                num_read += 1
        assert 0 < num_read < 400


def test_json_form_survives(tmp_path: Any):
    # What a test of the load test relies on: the configuration as the server sent it.
    with http_server() as url, open_connection(url) as connection:
        assert json.dumps(connection.model_config("sampler"), sort_keys=True) == json.dumps(
            CONFIG, sort_keys=True
        )
