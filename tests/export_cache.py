"""Exports of the tests, kept on disk between tests, workers and sessions.

torch.onnx takes seconds for a tiny model, and most tests need the same few exports. An entry's name
is the digest of all that the exporter reads: the model with its tensors, the sources of this
package that it runs through, and the versions of the packages that take part. Tests of the export
itself call `export_graph`, and so does whatever runs in a process without fork_driver.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from torch import Tensor

from tests import meter
from treeq_export.compile.export import export_graph
from treeq_export.evaluate.samples import digest_tensors
from treeq_export.model.zoo import Denoiser

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "test-exports"
SOURCES = (
    *(f"treeq_export/{path}" for path in ("model/**/*.py", "quant/**/*.py", "plan*")),
    *("treeq_export/ops.py", "treeq_export/compile/export.py", "treeq_served/denoise.py"),
)
PACKAGES = ("torch", "onnx", "onnxscript", "onnx_ir", "diffusers", "numpy")
_KNOWN = {"torch", "diffusers", "treeq_export"}  # packages whose classes the key covers
_UNUSED_S = 3 * 24 * 3600


@pytest.fixture(scope="session", autouse=True)
def cached_exports() -> Iterator[None]:
    """The compile stage takes its exports from here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("treeq_export.compile.stage.export_graph", export_once)
        yield


def export_once(denoiser: Denoiser, max_batch: int) -> ir.Model:
    """Export a denoiser as `export_graph` does, or return what an earlier call exported."""
    if {type(module).__module__.partition(".")[0] for module in denoiser.modules()} - _KNOWN:
        return export_graph(denoiser, max_batch)
    path = FOLDER / f"{export_key(denoiser, max_batch)}.onnx"
    if path.is_file():
        os.utime(path)
    else:
        with meter.uncharged():
            _write(export_graph(denoiser, max_batch), path)
    return ir.load(path)  # also after an export, so that it makes no difference who came first


def export_key(denoiser: Denoiser, max_batch: int) -> str:
    """Return the digest of all that an export depends on."""
    inputs = denoiser.make_example_inputs(2, seed=0)
    lines = [
        _digest_code(),
        str(max_batch),
        repr(denoiser),
        digest_tensors(dict(denoiser.named_parameters()) | dict(denoiser.named_buffers())),
        digest_tensors(inputs),
        *_attributes(denoiser),
    ]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _attributes(denoiser: Denoiser) -> Iterator[str]:
    """Yield what modules hold beside parameters, buffers and submodules."""
    for name, module in denoiser.named_modules():
        for key, value in sorted(vars(module).items()):
            if key not in ("_parameters", "_buffers", "_modules"):
                yield f"{name}.{key} {type(module)} {_describe(value)}"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return digest_tensors({"": value})
    text = repr(value)
    return str(type(value)) if " at 0x" in text else text


@cache
def _digest_code() -> str:
    """Return the digest of this package's part in an export and of the versions of the others."""
    digest = hashlib.sha256(platform.python_version().encode())
    for package in PACKAGES:
        digest.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    for path in [Path(__file__), *sorted(p for glob in SOURCES for p in ROOT.glob(glob))]:
        if path.is_file():
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _write(model: ir.Model, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.partial")
    ir.save(model, temporary)
    os.replace(temporary, path)  # noqa: PTH105 -- fork_driver's traps count calls of Path.replace


def remove_unused() -> None:
    """Remove entries that no session has read for three days, and what killed ones left."""
    oldest = time.time() - _UNUSED_S
    for path in FOLDER.glob("*"):
        if path.stat().st_mtime < oldest:
            path.unlink(missing_ok=True)
