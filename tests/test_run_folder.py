"""The names of a run folder are written in one place."""

from pathlib import Path

import pytest

import treeq_export
from treeq_export.run_folder import RunFolder

PACKAGE = Path(treeq_export.__file__).parent
FILES = [name for key, name in vars(RunFolder).items() if key.isupper() and "." in name[1:]]
OWN = {"run_folder.py", "engines/engine.py"}  # the second has a build.json in its cache


@pytest.mark.parametrize("name", FILES)
def test_no_other_module_spells_it(name: str) -> None:
    spelt = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if f'"{name}"' in path.read_text()
    ]
    assert set(spelt) <= OWN


def test_names_below_a_run_folder() -> None:
    run = Path("run")
    assert run / RunFolder.graph("ort") == Path("run/onnx/ort/model.onnx")
    assert run / RunFolder.engine("tensorrt", "tensorrt-native", "sm_89") == Path(
        "run/engines/tensorrt/tensorrt-native/sm_89"
    )
    assert run / RunFolder.engine("tensorrt", "ort") == Path("run/engines/tensorrt/ort")
    assert run / RunFolder.sample_grid("fp") == Path("run/samples/fp.png")
