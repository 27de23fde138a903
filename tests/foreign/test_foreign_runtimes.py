"""Which graph runs in which runtime of other makers: docs/runtimes.md says it, and this holds it.

The runtimes live in an environment of their own (`make foreign-env`): OpenVINO in its virtual
environment, onnxruntime-web and onnxruntime-node in its node_modules. Each runs the graphs of one
tiny DiT in three formats; what comes out is compared with the fake-quantized PyTorch model.
"""

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from tests.required import skip_or_fail
from treeq_export.compile.stage import run_compile
from treeq_export.model.quantized import quantize_model
from treeq_export.quant.metrics import sqnr_db
from treeq_export.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".foreign"
PYTHON = ENVIRONMENT / "bin" / "python"
MODULES = ENVIRONMENT / "node" / "node_modules"
PAGE = ROOT / "docs" / "runtimes.md"
# The search section's bits of weights and activations.
FORMATS: dict[str, tuple[int, int | None]] = {"W3A3": (3, 3), "W8A8": (8, 8), "W4": (4, None)}
TARGETS = ("portable", "ort", "tensorrt-native")
# A code on a rounding border that flips leaves 38..60 dB of about 125; a float16 body 33 or more.
LEAST_DB = {"portable": 30.0, "ort": 30.0, "tensorrt-native": 25.0}

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Graphs:
    """One format's graphs, inputs and what PyTorch makes of them."""

    run: Path
    inputs: dict[str, NDArray[Any]]
    expected: NDArray[np.float32]

    def inputs_of(self, target: str) -> dict[str, NDArray[Any]]:
        """The inputs in the types of a target's graph: those for TensorRT take int32."""
        model = onnx.load(self.run / RunFolder.graph(target), load_external_data=False)
        narrow = {
            value.name
            for value in model.graph.input
            if value.type.tensor_type.elem_type == onnx.TensorProto.INT32
        }
        return {
            name: array.astype(np.int32) if name in narrow else array
            for name, array in self.inputs.items()
        }


@pytest.fixture(scope="module", params=FORMATS)
def graphs(request: pytest.FixtureRequest, make_tiny_run: Callable[..., Any]) -> Graphs:
    """The tiny DiT in one format, compiled for all targets."""
    weight_bits, activation_bits = FORMATS[request.param]
    tiny = make_tiny_run("dit", weight_bits=weight_bits, activation_bits=activation_bits)
    section = tiny.recipe.compile.model_copy(update={"targets": list(TARGETS)})
    run_compile(tiny.run, tiny.denoiser, tiny.plan, tiny.tensors, section, lambda _: None)
    inputs = tiny.denoiser.make_example_inputs(3, seed=5)
    with torch.no_grad():
        expected = quantize_model(tiny.denoiser, tiny.plan, tiny.tensors)(*inputs.values())
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    return Graphs(tiny.run, arrays, expected.numpy())


@dataclass(frozen=True)
class Process:
    """A runtime in another environment: the command that runs an order, and what it needs."""

    command: tuple[str, ...]
    needs: Path

    def run(self, graphs: Graphs, target: str, folder: Path) -> NDArray[np.float32] | str:
        """Return the graph's output, or the one line with which the runtime refuses it."""
        require(self.needs)
        order = write_order(folder, graphs.run / RunFolder.graph(target), graphs.inputs_of(target))
        done = subprocess.run(
            [*self.command, str(order)], capture_output=True, text=True, timeout=120, check=False
        )
        output = folder / "output.bin"
        if done.returncode or not output.is_file():
            return (done.stderr.strip().splitlines() or ["no message"])[-1]
        return np.fromfile(output, np.float32).reshape(graphs.expected.shape)


class OwnOnnxRuntime:
    """ONNX Runtime's Python package as anyone has it: no custom-op library, default options."""

    def run(self, graphs: Graphs, target: str, folder: Path) -> NDArray[np.float32] | str:
        """Return the graph's output."""
        path = str(graphs.run / RunFolder.graph(target))
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        output: NDArray[np.float32] = session.run(None, graphs.inputs_of(target))[0]
        return output


def require(path: Path) -> None:
    """Skip where a runtime is not installed, or fail where TREEQ_REQUIRE names foreign."""
    if not path.exists():
        skip_or_fail("foreign", f"{path.relative_to(ROOT)} is missing: run `make foreign-env`")


def write_order(folder: Path, model: Path, inputs: dict[str, NDArray[Any]]) -> Path:
    """Write inputs as raw numbers and the order that names them; return the order's path."""
    for name, array in inputs.items():
        array.tofile(folder / f"{name}.bin")
    order = {
        "model": str(model),
        "inputs": [
            {
                "name": name,
                "dtype": str(array.dtype),
                "shape": list(array.shape),
                "file": str(folder / f"{name}.bin"),
            }
            for name, array in inputs.items()
        ],
        "output": str(folder / "output.bin"),
    }
    path = folder / "order.json"
    path.write_text(json.dumps(order))
    return path


def node(package: str) -> Process:
    """Return the runner of an npm package."""
    script = Path(__file__).with_name("run_onnxruntime.mjs")
    return Process(("node", str(script), str(MODULES / package)), MODULES / package)


RUNTIMES: dict[str, Process | OwnOnnxRuntime] = {
    "onnxruntime (Python)": OwnOnnxRuntime(),
    "onnxruntime-node": node("onnxruntime-node"),
    "onnxruntime-web (wasm)": node("onnxruntime-web"),
    "OpenVINO (CPU)": Process(
        (str(PYTHON), str(Path(__file__).with_name("run_openvino.py"))), PYTHON
    ),
}


def read_page() -> dict[str, dict[str, str]]:
    """Return the page's table: runtime -> column -> cell."""
    rows = [
        [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("|") and not set(line) <= set("|- ")
    ]
    header = next(row for row in rows if row[0] == "runtime")
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows if row[0] in RUNTIMES}


def test_the_page_names_every_runtime_and_target():
    table = read_page()
    assert set(table) == set(RUNTIMES)
    for row in table.values():
        assert set(TARGETS) <= set(row)
        assert {row[target].split(":")[0] for target in TARGETS} <= {"runs", "refuses"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_does_what_the_page_says(
    runtime: str, target: str, graphs: Graphs, tmp_path: Path
):
    says = read_page()[runtime][target]
    result = RUNTIMES[runtime].run(graphs, target, tmp_path)
    if isinstance(result, str):
        assert says.startswith("refuses"), result
        operators = re.findall(r"treeq\S*?(\w+Linear)", says)
        assert all(operator in result for operator in operators), result
    else:
        assert says == "runs"
        assert sqnr_db(graphs.expected, result) >= LEAST_DB[target]


def test_the_versions_of_the_page_are_those_that_were_run():
    table = read_page()
    for runtime, version in installed_versions().items():
        assert table[runtime]["tested"] == version, runtime
    assert installed_versions()


def installed_versions() -> dict[str, str]:
    """Return the versions of the runtimes that are there."""
    found = {"onnxruntime (Python)": onnxruntime.__version__}
    for package, runtime in (
        ("onnxruntime-node", "onnxruntime-node"),
        ("onnxruntime-web", "onnxruntime-web (wasm)"),
    ):
        manifest = MODULES / package / "package.json"
        require(manifest)
        found[runtime] = json.loads(manifest.read_text())["version"]
    require(PYTHON)
    command = [str(PYTHON), "-c", "import openvino; print(openvino.__version__.split('-')[0])"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    found["OpenVINO (CPU)"] = ".".join(done.stdout.strip().split(".")[:3])
    return found
