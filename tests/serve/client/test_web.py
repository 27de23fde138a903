"""The side-car's interface: images, errors, health, and what it lets a browser do."""

import base64
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import save_file

from tests.serve.client.conftest import RAISING_SEED, SLOW_SEED, Fake, RunningPage
from treeq_export.cli import main
from treeq_export.client.connection import Connection
from treeq_export.client.inputs import make_inputs
from treeq_export.client.sampler import read_info
from treeq_export.client.web import SideCar, content_security_policy
from treeq_export.errors import ServeError

pytestmark = pytest.mark.triton
OpenPage = Callable[..., RunningPage]


def ask(page: RunningPage, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Return status and JSON of a GET, or of a POST where there is a body."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | headers
    request = urllib.request.Request(page.url + path, data, headers)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.mark.parametrize("server", ["http", "grpc"])
def test_model_and_image(
    open_page: OpenPage, connect: Callable[..., Connection], fake: Fake, server: str
):
    page = open_page(server)
    status, model = ask(page, "api/model")
    assert status == 200
    assert (model["model"], model["num_classes"], model["steps"]) == ("digits", 10, 20)
    assert (model["guidance"], model["target"], model["mode"]) == (1.5, "ort", "inprocess")
    assert model["url"] == getattr(fake, server)
    order = {"label": 7, "seed": 1, "steps": 4, "guidance": 2}
    status, answer = ask(page, "api/image", order)
    assert status == 200
    assert {key: answer[key] for key in ("label", "seed", "step", "guidance", "width")} == {
        "label": 7,
        "seed": 1,
        "step": 4,
        "guidance": 2.0,
        "width": 8,
    }
    assert 0 < answer["latency_ms"] < 5000
    connection = connect("http")
    inputs = make_inputs(read_info(connection), label=7, seed=1)
    wanted = connection.infer("sampler", inputs, ["image"])["image"][0, :, :, 0]
    with Image.open(io.BytesIO(base64.b64decode(answer["png"]))) as picture:
        assert picture.info["seed"] == "1"
        np.testing.assert_array_equal(np.asarray(picture), wanted)
    assert ask(page, "api/image", {"label": 7})[1]["step"] == 20  # the server's default


def test_a_streaming_sampler(open_page: OpenPage):
    assert ask(open_page("grpc", "stream"), "api/image", {"label": 7, "seed": 1})[0] == 200
    status, answer = ask(open_page("http", "stream"), "api/image", {"label": 7})
    assert status == 400
    assert "HTTP cannot stream" in answer["error"]


def test_a_text_model(open_page: OpenPage, tmp_path: Path):
    path = tmp_path / "prompts.safetensors"
    shapes = {"encoder_hidden_states": (2, 3, 4), "pooled_projections": (2, 5)}
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, path)
    page = open_page("http", "text", conditioning=path)
    assert ask(page, "api/model")[1]["num_prompts"] == 2
    assert ask(page, "api/image", {"prompt": 2}) == (
        400,
        {"error": "prompt: received 2, expected 0..1. The file holds 2."},
    )
    status, answer = ask(page, "api/image", {"prompt": 1})
    assert status == 400  # the fake text model has no decoder
    assert answer["error"].startswith("text: has no output image")


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ({"label": 12}, "label: received 12, expected 0..9. digits has 10 classes."),
        ({"label": 1, "steps": 0}, "steps: received 0, expected 1 or more."),
        ({"label": "7"}, "label: Input should be a valid integer."),
        ({"label": 1, "lable": 1}, "lable: Extra inputs are not permitted."),
        ([1], "body: Input should be an object."),
    ],
)
def test_a_request_that_is_refused(open_page: OpenPage, body: Any, line: str):
    assert ask(open_page(), "api/image", body) == (400, {"error": line})


def test_errors_of_the_server_have_a_status(open_page: OpenPage):
    page = open_page()
    status, answer = ask(page, "api/image", {"label": 1, "seed": RAISING_SEED})
    assert status == 502
    assert "raised on purpose" in answer["error"]
    down = open_page("http://127.0.0.1:1")
    for path, body in (("api/model", None), ("api/image", {"label": 1})):
        status, answer = ask(down, path, body)
        assert status == 503
        assert "not reached (Connection refused)" in answer["error"]


def test_only_json_is_taken(open_page: OpenPage):
    # What a form on a page of another host can send.
    form = {"Content-Type": "text/plain"}
    status, _ = ask(open_page(), "api/image", {"label": 1}, **form)
    assert status == 415


def test_health(open_page: OpenPage):
    status, record = ask(open_page(), "healthz")
    assert (status, record["healthy"]) == (200, True)
    assert record["models"][0]["name"] == "sampler"
    status, record = ask(open_page("http://127.0.0.1:1"), "healthz")
    assert (status, record["healthy"]) == (503, False)


def test_a_slow_image_blocks_nothing(open_page: OpenPage):
    page = open_page()
    slow = threading.Thread(target=ask, args=(page, "api/image", {"label": 1, "seed": SLOW_SEED}))
    slow.start()
    time.sleep(0.1)
    start = time.monotonic()
    assert ask(page, "api/model")[0] == 200
    with urllib.request.urlopen(page.url):
        pass
    assert time.monotonic() - start < 0.5  # the image takes 0.8 s
    assert slow.is_alive()
    slow.join()


def test_many_at_once(open_page: OpenPage):
    page = open_page()
    found: list[int] = []
    threads = [
        threading.Thread(
            target=lambda seed=seed: found.append(
                ask(page, "api/image", {"label": 1, "seed": seed})[0]
            )
        )
        for seed in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [200] * 20


def test_the_page_may_load_nothing_but_itself(open_page: OpenPage):
    with urllib.request.urlopen(open_page().url) as response:
        page = response.read().decode()
        policy = response.headers["Content-Security-Policy"]
    assert policy == content_security_policy(page)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert page.count("<script") == page.count("<style") == 1
    for outside in ("http:", "https:", "src=", "@import", "url("):
        assert outside not in page


def test_the_command_serves_until_it_is_told_to_end(fake: Fake):
    command = [sys.executable, "-W", "error", "-m", "treeq_export.cli", "web"]
    command += ["--url", fake.http, "--port", "0"]
    for number in (signal.SIGINT, signal.SIGTERM):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            url, _, rest = process.stderr.readline().partition("  ")
            assert rest == "Ctrl-C stops it.\n"
            with urllib.request.urlopen(f"{url}healthz") as response:
                assert json.load(response)["healthy"] is True
            process.send_signal(number)
            assert process.stderr.read() == ""
            assert process.wait(10) == 0


def test_without_aiohttp(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "treeq_export.client.web")
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    done = CliRunner().invoke(main, ["web"])
    assert done.exit_code == 1
    assert done.stderr.endswith("Install it: pip install 'treeq-export[serve]'\n")


def test_what_cannot_be_served():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = CliRunner().invoke(main, ["web", "--port", str(taken.getsockname()[1])])
    assert done.exit_code == 1
    assert "cannot listen there" in done.stderr
    assert done.stderr.strip().endswith("Choose another --port or --address.")
    with pytest.raises(ServeError, match=r"^url: received"):
        SideCar("ftp://x")
