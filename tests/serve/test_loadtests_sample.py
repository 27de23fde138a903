"""samples/local_triton/loadtests.py: what it calls a failure, and a short run of all of it."""

import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from tests.serve.conftest import load_sample


@pytest.fixture(scope="module")
def loadtests() -> ModuleType:
    return load_sample("loadtests")


def run(
    loadtests: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, dict[str, Any]]:
    """Call the program; returns its exit status and its record."""
    monkeypatch.setattr(sys, "argv", ["loadtests.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        loadtests.main()
    out = Path(str(arguments[arguments.index("--out") + 1]))
    assert isinstance(caught.value.code, int)
    return caught.value.code, json.loads((out / "serving.json").read_bytes())


@pytest.mark.triton
@pytest.mark.slow
def test_one_repository_in_short(
    loadtests: ModuleType,
    served_run: Path,
    server_python: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(loadtests, "WARMUP_S", 0.2)
    monkeypatch.setattr(loadtests, "WARMUP_ROUNDS", 1)
    # Memory is still settling in the first seconds.
    monkeypatch.setattr(loadtests, "GROWTH_LIMIT_BYTES", 1_000_000_000)
    monkeypatch.setattr(loadtests, "VARIANTS", {"bls_batching": ("bls", True)})
    arguments = (
        *(served_run, "--python", server_python, "--out", tmp_path, "--clients", 2),
        *("--duration", 4, "--sweep-duration", 0.3, "--rounds", 3),
    )
    status, record = run(loadtests, monkeypatch, *arguments)
    shown = capsys.readouterr()
    assert (status, record["failures"]) == (0, [])
    part = record["parts"]["bls_batching"]
    assert part["overhead"]["equal"] == {"http": True, "grpc": True}
    assert {name: len(times) for name, times in part["overhead"]["times_ms"].items()} == {
        "direct": 3,
        "http": 3,
        "grpc": 3,
    }
    assert [level["concurrency"] for level in part["sweep"]["levels"]] == [1, 2]
    (steady,) = part["steady"]["levels"]
    sampler, denoiser = steady["models"]
    assert sampler["num_requests"] == steady["num_requests"] == len(steady["latencies_ms"])
    assert denoiser["num_requests"] == steady["num_requests"] * part["steady"]["setup"]["steps"]
    assert steady["memory"]["growth_bytes"] is not None
    with Image.open(io.BytesIO((tmp_path / "serving.png").read_bytes())) as image:
        assert image.width > 1000
    assert shown.out.startswith("bls_batching: direct ")
    assert str(tmp_path) not in json.dumps(record)

    # The same command finds the work done; a limit that is exceeded is a failure.
    again, kept = run(loadtests, monkeypatch, *arguments)
    assert (again, kept["parts"]) == (0, record["parts"])
    assert "bls_batching: up to date" in capsys.readouterr().err
    failures(loadtests, part, monkeypatch)


def failures(loadtests: ModuleType, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check what is called a failure, on a measured part."""
    part = loadtests.Part.model_validate(plain)
    monkeypatch.setattr(loadtests, "GROWTH_LIMIT_BYTES", -(10**12))
    (grown,) = loadtests.find_failures("x", part)
    assert grown.startswith("x: memory grew by ")
    plain = json.loads(json.dumps(plain))
    plain["overhead"]["equal"]["grpc"] = False
    plain["sweep"]["levels"][1] |= {"num_errors": 1, "errors": {"down": 1}}
    plain["steady"]["levels"][0]["memory"] = None
    lines = loadtests.find_failures("x", loadtests.Part.model_validate(plain))
    assert lines[0] == "x: the image over grpc differs from the direct runner's"
    assert lines[1].startswith("x, sweep: 1 of ")
    assert lines[2] == "x: too few samples of memory. Raise --duration."
