"""What reaches the code inside the server: damaged manifests and settings, odd requests."""

import dataclasses
import json
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from treeq_served import check_manifest, requests, settings

MANIFEST: dict[str, Any] = {
    "format_version": 1,
    "root": None,
    "backend": "python",
    "backend_version": "1.32.0",
    "models": {"sampler": [1]},
    "packages": {"sampler": {"numpy": np.__version__}},
    "files": {
        "sampler/1/model.py": {
            "bytes": 1,
            "sha256": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb",
        }
    },
}
NETWORK = settings.NetworkSettings(
    model="denoiser",
    runtime="onnxruntime",
    file="1/model.onnx",
    library=None,
    inputs={"sample": "float32"},
    output="prediction",
    max_batch=4,
)
SAMPLER = settings.SamplerSettings(
    network=NETWORK,
    scheduler="ddim",
    steps=4,
    guidance_scale=1.5,
    sample_shape=[1, 2, 2],
    prediction_channels=1,
    num_classes=10,
    conditioning={},
    null={"class_labels": 10.0},
    embedded_guidance=None,
    image="pixels",
    concurrency=2,
)


def write(root: Path, manifest: Any) -> Path:
    (root / "sampler" / "1").mkdir(parents=True, exist_ok=True)
    (root / "sampler" / "1" / "model.py").write_text("a")
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    (root / "manifest.json").write_text(text)
    return root


def problems(root: Path) -> list[str]:
    """Return what is wrong, a line each."""
    found = check_manifest.check_repository(root, Path("/none"))
    assert all("\n" not in line for line in found)
    return found


def test_a_right_manifest(tmp_path: Path):
    assert problems(write(tmp_path, MANIFEST)) == []


WRONG: dict[str, Any] = {
    "empty": "",
    "list": [],
    "null": None,
    "text": '"x"',
    "nothing in it": {},
    "deep": "[" * 100_000,
    "deep object": '{"a":' * 100_000,
    "digits": '{"format_version": ' + "9" * 5000 + "}",
    "root": MANIFEST | {"root": 3},
    "backend": MANIFEST | {"backend": None},
    "backend version": MANIFEST | {"backend_version": "x"},
    "backend version of digits": MANIFEST | {"backend_version": "9" * 5000 + ".1"},
    "models": MANIFEST | {"models": 0},
    "versions": MANIFEST | {"models": {"sampler": 1}},
    "version": MANIFEST | {"models": {"sampler": ["1"]}},
    "no version": MANIFEST | {"models": {"sampler": [True]}},
    "model elsewhere": MANIFEST | {"models": {"../x": [1]}},
    "packages": MANIFEST | {"packages": []},
    "package": MANIFEST | {"packages": {"sampler": {"numpy": 2}}},
    "files": MANIFEST | {"files": []},
    "file": MANIFEST | {"files": {"sampler/a": {}}},
    "file of no model": MANIFEST | {"files": {"a": MANIFEST["files"]["sampler/1/model.py"]}},
    "file elsewhere": MANIFEST | {"files": {"sampler/../../a": {"bytes": 1, "sha256": "x"}}},
    "bytes": MANIFEST | {"files": {"sampler/a": {"bytes": "1", "sha256": "x"}}},
    "digest": MANIFEST | {"files": {"sampler/a": {"bytes": 1, "sha256": None}}},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_manifest_of_another_form(tmp_path: Path, case: str):
    (line,) = problems(write(tmp_path, WRONG[case]))
    assert line.startswith(f"{tmp_path / 'manifest.json'}: ")
    assert line.endswith("Write the repository again with `treeq-export serve`.")
    with pytest.raises(ValueError, match=r"manifest\.json: "):
        check_manifest.check_model(tmp_path / "sampler", "1")


def test_mutated_manifests_are_lines(tmp_path: Path):
    text = json.dumps(MANIFEST).encode()
    chance = random.Random(0)
    write(tmp_path, MANIFEST)
    for _ in range(300):
        data = bytearray(text)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(data))
            data[place : place + chance.randint(0, 3)] = chance.choice(
                [b"", b"0", b"[", b'"', b"\xff", b"null", b"-", b"\\u0000", b"../"]
            )
        (tmp_path / "manifest.json").write_bytes(data)
        problems(tmp_path)
        with suppress(ValueError):
            check_manifest.check_model(tmp_path / "sampler", "1")


@pytest.mark.parametrize("name", ["x y", "x$y", "x'y"])
def test_a_repository_at_an_unfit_path(tmp_path: Path, name: str):
    (line,) = problems(write(tmp_path / name, MANIFEST))
    assert "Triton's Python backend cannot have in a path" in line


@pytest.mark.parametrize("launch", [False, True])
def test_the_sample_server_refuses_an_unfit_path(tmp_path: Path, launch: bool):
    root = write(tmp_path / "x y", MANIFEST)
    if launch:
        (root / "launch.sh").write_text("exit 1")
    script = Path(__file__).parents[2] / "samples/local_triton/server.py"
    done = subprocess.run(
        [sys.executable, script, root], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"'{root}': holds ' ', which Triton's Python backend cannot")
    assert len(done.stderr.splitlines()) == 1


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(_path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(check_manifest, "_sha256", refuse)
    (line,) = problems(write(tmp_path, MANIFEST))
    assert "model.py: cannot be read (Permission denied)" in line


def test_right_settings_are_read_as_written(tmp_path: Path):
    (tmp_path / "settings.json").write_text(settings.to_json(SAMPLER))
    assert settings.read_sampler(tmp_path) == SAMPLER
    (tmp_path / "settings.json").write_text(settings.to_json(NETWORK))
    assert settings.read_network(tmp_path) == NETWORK


def test_settings_with_a_pipelines_scheduler_are_read_as_written(tmp_path: Path):
    config = {"shift": 3.0, "base_shift": None, "use_dynamic_shifting": False}
    scheduler = {"class_name": "FlowMatch", "config": config, "mu": None, "even_sigmas": False}
    own = dataclasses.replace(SAMPLER, scheduler=scheduler)
    (tmp_path / "settings.json").write_text(settings.to_json(own))
    assert settings.read_sampler(tmp_path) == own


def changed(**values: Any) -> dict[str, Any]:
    return asdict(SAMPLER) | values


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        "{}",
        "[" * 100_000,
        changed(network=None),
        changed(network=[]),
        changed(network={}),
        changed(network=asdict(NETWORK) | {"more": 1}),
        changed(network=asdict(NETWORK) | {"inputs": {"sample": 3}}),
        changed(network=asdict(NETWORK) | {"max_batch": True}),
        changed(steps="4"),
        changed(steps=None),
        changed(steps=1.5),
        changed(sample_shape=[1, "2"]),
        changed(sample_shape={}),
        changed(null=[]),
        changed(image=3),
        changed(more=1),
        {key: value for key, value in asdict(SAMPLER).items() if key != "steps"},
    ],
)
def test_damaged_settings_are_one_line(tmp_path: Path, content: Any):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "settings.json").write_text(text)
    for read in (settings.read_sampler, settings.read_network):
        with pytest.raises(
            ValueError, match=r"settings\.json: .* `treeq-export serve`\.$"
        ) as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        settings.read_sampler(tmp_path)


def rows(**changes: Any) -> dict[str, Any]:
    return {"label": np.array([[1]]), "seed": np.array([[2]])} | changes


ODD: dict[str, dict[str, Any]] = {
    "nothing": {},
    "no seed": {"label": np.array([[1]])},
    "no label": {"seed": np.array([[1]])},
    "no rows": {"label": np.zeros((0, 1), int), "seed": np.zeros((0, 1), int)},
    "fewer labels": rows(seed=np.array([[1], [2]])),
    "more labels": rows(label=np.array([[1], [2]])),
    "two columns": rows(label=np.array([[1, 2]])),
    "no axis": rows(seed=np.array(3)),
    "steps of another count": rows(steps=np.array([[1], [2]])),
    "previews of no rows": rows(preview_every=np.zeros((0, 1), int)),
    "text": rows(seed=np.array([[b"x"]], object)),
    "negative": rows(seed=np.array([[-1]])),
    "huge steps": rows(steps=np.array([[2**31 - 1]])),
    "label out of range": rows(label=np.array([[10]])),
    "guidance": rows(guidance=np.array([[np.nan]], np.float32)),
    "many rows of one": rows(label=np.zeros((100_000, 1), int)),
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_request_is_refused(case: str):
    with pytest.raises(requests.RefusedError) as caught:
        requests.read_job(ODD[case], ("latents",), None, SAMPLER)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 5), (1, 3, 4, 1), (2, 3, 4), (1, 0, 4)])
def test_an_odd_prompt_is_refused(shape: tuple[int, ...]):
    text = settings.SamplerSettings(
        **asdict(SAMPLER) | {"network": NETWORK, "num_classes": None, "conditioning": {"t": [3, 4]}}
    )
    arrays = {"seed": np.array([[1]]), "t": np.zeros(shape, np.float32)}
    with pytest.raises(requests.RefusedError, match=r"^t: received "):
        requests.read_job(arrays, ("latents",), None, text)


def test_prompts_of_any_length_are_sampled_apart():
    text = settings.SamplerSettings(
        **asdict(SAMPLER)
        | {"network": NETWORK, "num_classes": None, "conditioning": {"t": [-1, 4]}}
    )
    jobs = [
        requests.read_job(
            {"seed": np.array([[1]]), "t": np.zeros((1, size, 4), np.float32)}, (), None, text
        )
        for size in (3, 5, 3)
    ]
    assert sorted(len(group.rows) for group in requests.group_rows(jobs)) == [1, 2]


def test_one_odd_request_does_not_keep_others_from_an_answer():
    read: Callable[..., Any] = requests.read_job
    assert read(rows(), ("latents",), None, SAMPLER).seeds == [2]
