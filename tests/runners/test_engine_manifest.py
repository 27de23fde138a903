"""A manifest that does not fit is refused, in one line, with what to do."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from treeq_export.errors import RunnerError
from treeq_export.records import save_record
from treeq_export.records.build import (
    EngineManifest,
    PluginReference,
    ShapeRange,
    VerifierSummary,
)
from treeq_export.runners import engine_manifest
from treeq_export.runners.engine_manifest import check_manifest, own_gpu
from treeq_export.runners.tensorrt_library import Runtime

ENGINE = b"an engine"


def make_manifest(**changes: Any) -> EngineManifest:
    fields: dict[str, Any] = {
        "treeq_version": "1",
        "runtime": "tensorrt-rtx",
        "runtime_version": "1.7",
        "gpu": "sm_89",
        "target": "tensorrt",
        "key": "k",
        "engine_sha256": hashlib.sha256(ENGINE).hexdigest(),
        "engine_bytes": len(ENGINE),
        "graph_sha256": "g",
        "data_sha256": None,
        "plan_sha256": "p",
        "profile": {"x": ShapeRange(min=[1], opt=[2], max=[8])},
        "bits": {"fc": (3, 3)},
        "plugins": [PluginReference(name="QLinear", version="1", namespace="treeq")],
        "build_s": 1.0,
        "peak_bytes": 1,
        "verifier": VerifierSummary(
            num_quantized=1,
            num_plugins=1,
            num_int8_gemms=0,
            num_weight_only=0,
            num_engine_layers=2,
        ),
    }
    return EngineManifest(**fields | changes)


def make_runtime(*plugins: str, name: Any = "tensorrt-rtx", version: str = "1.7") -> Runtime:
    registry = SimpleNamespace(get_creator=lambda n, v, s: f"{s}::{n}.{v}" in plugins or None)
    return Runtime(name, SimpleNamespace(get_plugin_registry=lambda: registry), version)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.engine").write_bytes(ENGINE)
    save_record(tmp_path / "manifest.json", make_manifest())
    return tmp_path


REGISTERED = make_runtime("treeq::QLinear.1")


def test_a_manifest_that_fits_is_returned(folder: Path):
    assert check_manifest(folder, REGISTERED, gpu="sm_89") == make_manifest()


@pytest.mark.parametrize(
    ("runtime", "gpu", "words"),
    [
        (
            make_runtime(name="tensorrt"),
            "sm_89",
            r"built for tensorrt-rtx, received tensorrt\. .*build --runtime tensorrt --gpu sm_89",
        ),
        (
            make_runtime("treeq::QLinear.1", version="1.8"),
            "sm_89",
            r"built with tensorrt-rtx 1\.7, received 1\.8.*pip install tensorrt-rtx==1\.7",
        ),
        (REGISTERED, "sm_120", r"built for sm_89, but the GPU is sm_120\. .* --gpu sm_120"),
        (make_runtime(), "sm_89", r"needs the plugin treeq::QLinear version 1.*libtreeq_plugins"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, runtime: Runtime, gpu: str, words: str):
    with pytest.raises(RunnerError, match=words) as error:
        check_manifest(folder, runtime, gpu=gpu)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [b"another e", b"short"])
def test_a_changed_engine_is_refused(folder: Path, change: bytes):
    (folder / "model.engine").write_bytes(change)
    with pytest.raises(RunnerError, match=r"not the file that manifest\.json names\. Run"):
        check_manifest(folder, REGISTERED, gpu="sm_89")


def test_a_missing_engine_is_refused(folder: Path):
    (folder / "model.engine").unlink()
    with pytest.raises(RunnerError, match=r"model\.engine: missing\. Run `treeq-export build"):
        check_manifest(folder, REGISTERED, gpu="sm_89")


@pytest.mark.parametrize("text", [None, "{}", "no json"])
def test_a_missing_or_malformed_manifest_is_refused(folder: Path, text: str | None):
    path = folder / "manifest.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(RunnerError, match=r"manifest\.json: .+\. Build the engine again"):
        check_manifest(folder, REGISTERED, gpu="sm_89")


def test_a_machine_without_gpu_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_manifest, "own_gpu", lambda: None)
    with pytest.raises(RunnerError, match=r"this machine has no NVIDIA GPU\. `treeq-export doctor"):
        check_manifest(folder, REGISTERED)


class Attributes:
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 12
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 1


@pytest.mark.parametrize(
    ("status", "count", "expected"), [(0, 1, "sm_121"), (0, 0, None), (100, 1, None)]
)
def test_the_own_gpu(
    monkeypatch: pytest.MonkeyPatch, status: int, count: int, expected: str | None
):
    driver = SimpleNamespace(
        cuInit=lambda _: (status,),
        cuDeviceGetCount=lambda: (0, count),
        cuDeviceGetAttribute=lambda attribute, _: (0, attribute),
        CUdevice_attribute=Attributes,
    )
    monkeypatch.setattr(engine_manifest, "load_driver", lambda: driver)
    assert own_gpu() == expected


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise RunnerError("no cuda-python")

    monkeypatch.setattr(engine_manifest, "load_driver", fail)
    assert own_gpu() is None
