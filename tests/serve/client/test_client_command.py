"""`treeq-export client` and the sample client, against the real server."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file

from tests.serve.client.conftest import Fake
from tests.serve.conftest import ROOT
from treeq_export.cli import main
from treeq_export.client.connection import Connection
from treeq_export.client.inputs import make_inputs
from treeq_export.client.sampler import read_info

pytestmark = pytest.mark.triton
Connect = Callable[..., Connection]


def client(*args: object) -> Result:
    return CliRunner().invoke(main, ["client", *map(str, args)])


def error_of(result: Result) -> str:
    assert result.exit_code == 1, result.output
    line = result.stderr.strip()
    assert "\n" not in line
    return line.removeprefix("treeq-export: ")


def expected(connect: Connect, label: int, seed: int) -> dict[str, NDArray[Any]]:
    connection = connect("http")
    inputs = make_inputs(read_info(connection), label=label, seed=seed)
    return connection.infer("sampler", inputs, ["latents", "image"])


def pixels_of(path: Path, scale: int) -> NDArray[np.uint8]:
    with Image.open(path) as picture:
        return np.asarray(picture)[::scale, ::scale]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_one_image(fake: Fake, connect: Connect, tmp_path: Path, protocol: str):
    out, raw = tmp_path / "new/x.png", tmp_path / "x.npy"
    url = getattr(fake, protocol).replace("//", "//me:secret@")
    done = client("--url", url, "--label", 7, "--seed", 1, "--out", out, "--latents", raw, "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    (image,) = record["images"]
    wanted = expected(connect, 7, 1)
    assert record["url"] == getattr(fake, protocol)
    assert (record["model"], record["version"], record["target"]) == ("digits", "1", "ort")
    assert image["latents_sha256"] == hashlib.sha256(wanted["latents"].tobytes()).hexdigest()
    assert image["shapes"] == {"image": [8, 8, 1], "latents": [1, 8, 8], "step": [1]}
    assert (image["label"], image["seed"], image["step"]) == (7, 1, 20)
    assert 0 < image["latency_ms"] < 10_000
    assert image["file"] == str(out)
    np.testing.assert_array_equal(np.load(raw), wanted["latents"])
    np.testing.assert_array_equal(pixels_of(out, 32), wanted["image"][0, :, :, 0])
    with Image.open(out) as picture:
        assert picture.size == (256, 256)
        assert picture.info == {
            "label": "7",
            "seed": "1",
            "steps": "20",
            "step": "20",
            "guidance": "1.5",
            "model": "digits",
            "version": "1",
            "target": "ort",
            "url": getattr(fake, protocol),
        }


def test_several_images_in_batches(fake: Fake, connect: Connect, tmp_path: Path):
    out, raw = tmp_path / "x.png", tmp_path / "x.npy"
    done = client(
        *("--url", fake.http, "--label", 3, "--seed", 10, "--num", 6, "--scale", 1),
        *("--out", out, "--latents", raw),
    )
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert len(lines) == 7
    assert lines[0].startswith("label 3  seed 10  20 steps  ")
    assert lines[0].endswith(f"ms (batch of 4)  {tmp_path}/x.seed10.png")
    assert lines[5].endswith(f"ms (batch of 2)  {tmp_path}/x.seed15.png")
    assert lines[6] == f"raw samples  {raw}"
    assert np.load(raw).shape == (6, 1, 8, 8)
    wanted = expected(connect, 3, 15)
    np.testing.assert_array_equal(np.load(raw)[5:], wanted["latents"])
    np.testing.assert_array_equal(
        pixels_of(tmp_path / "x.seed15.png", 1), wanted["image"][0, :, :, 0]
    )


def test_a_stream_with_previews(fake: Fake, connect: Connect, tmp_path: Path):
    out = tmp_path / "x.png"
    model = ("--url", fake.grpc, "--model", "stream", "--label", 7, "--seed", 1)
    done = client(*model, "--stream", "--preview-every", 8, "--out", out)
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines() == ["step 8/20", "step 16/20", "step 20/20"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "x.png",
        "x.step008.png",
        "x.step016.png",
    ]
    wanted = expected(connect, 7, 1)
    np.testing.assert_array_equal(pixels_of(out, 32), wanted["image"][0, :, :, 0])
    assert done.stdout.splitlines()[1:] == [
        f"  {tmp_path}/x.step008.png",
        f"  {tmp_path}/x.step016.png",
    ]
    plain = client(*model, "--json")
    (image,) = json.loads(plain.stdout)["images"]
    assert image["latents_sha256"] == hashlib.sha256(wanted["latents"].tobytes()).hexdigest()
    assert "image" not in image["shapes"]  # what is not needed is not asked for


def test_a_text_model(fake: Fake, tmp_path: Path):
    path, raw = tmp_path / "prompts.safetensors", tmp_path / "x.npy"
    hidden = np.zeros((2, 3, 4), np.float32)
    save_file({"encoder_hidden_states": hidden, "pooled_projections": hidden[:, 0, :1] + 0}, path)
    model = ("--url", fake.http, "--model", "text")
    assert error_of(client(*model, "--conditioning", path)).startswith(
        f"{path}: pooled_projections: received shape (2, 1), expected (prompts, 5)."
    )
    save_file(
        {"encoder_hidden_states": hidden, "pooled_projections": np.zeros((2, 5), np.float32)}, path
    )
    done = client(*model, "--conditioning", path, "--prompt", 1, "--seed", 5, "--latents", raw)
    assert done.exit_code == 0, done.output
    assert np.load(raw).shape == (1, 1, 8, 8)
    assert error_of(client(*model, "--conditioning", path, "--out", tmp_path / "x.png")) == (
        "text: has no output image, only latents, step. Write the raw sample with "
        "--latents FILE.npy."
    )
    assert error_of(client(*model, "--label", 1)).startswith("conditioning: digits is a text model")


def test_what_is_refused(fake: Fake, tmp_path: Path):
    url = ("--url", fake.http)
    assert error_of(client(*url, "--label", 12)) == (
        "label: received 12, expected 0..9. digits has 10 classes."
    )
    assert error_of(client(*url, "--label", 1, "--num", 0)) == (
        "num: received 0, expected 1 or more."
    )
    assert error_of(client(*url, "--label", 1, "--model", "denoiser")) == (
        f"{fake.http}: denoiser: no sampler of treeq-export (its configuration has no treeq_* "
        "parameters). Name the sampler's model with --model."
    )
    assert error_of(client(*url, "--label", 1, "--stream")).startswith(
        f"{fake.http}: sampler does not stream."
    )
    assert error_of(client(*url, "--label", 1, "--preview-every", 3)) == (
        "--preview-every: needs --stream. Add it."
    )
    assert error_of(client(*url, "--label", 1, "--model", "stream")).startswith(
        f"{fake.http}: stream streams, which HTTP cannot. Use --url grpc://127.0.0.1:PORT"
    )
    assert "not reached (Connection refused)" in error_of(client("--url", "127.0.0.1:1"))
    (tmp_path / "file").touch()
    folder = tmp_path / "file/x.png"
    assert "cannot be written" in error_of(client(*url, "--label", 1, "--out", folder))


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_sample_client(fake: Fake, connect: Connect, tmp_path: Path, protocol: str):
    script, out = ROOT / "samples" / "triton_client.py", tmp_path / "x.png"
    assert "treeq_export" not in script.read_text()
    url = getattr(fake, protocol).split("//")[1]
    command = [sys.executable, "-W", "error", script, "--url", url, "--seed", "1", "--out", out]
    command += ["--grpc"] if protocol == "grpc" else []
    done = subprocess.run([*command, "--label", "7"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{out}: label 7, 20 steps, ")
    assert done.stderr == ""
    wanted = expected(connect, 7, 1)
    np.testing.assert_array_equal(pixels_of(out, 32), wanted["image"][0, :, :, 0])
    wrong = subprocess.run([*command, "--label", "12"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert wrong.stderr.strip().endswith("sampler: label: received 12, expected 0..9.")
