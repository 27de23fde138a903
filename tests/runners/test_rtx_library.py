"""TensorRT-RTX's import, and the parser that aborts the process without its cure."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from treeq_export.errors import RunnerError
from treeq_export.runners import tensorrt_library
from treeq_export.runners.tensorrt_library import (
    PARSER_OPENS,
    Runtime,
    load_runtime,
    require_parser,
    stub_library,
)

# Parses one plugin node and builds; the cure is what differs.
CHILD = """
import sys
import numpy as np
from onnx import TensorProto, helper, numpy_helper
from treeq_export.runners import tensorrt_library as library
if sys.argv[1] == "without":
    library._cure_parser = lambda: None
runtime = library.load_runtime("tensorrt-rtx")
from treeq_export.runners.tensorrt_plugin import register_plugins
register_plugins(runtime)
trt = runtime.module
factors = [("R", (1, 32, 2)), ("L", (1, 2, 32))]
weights = [numpy_helper.from_array(np.ones(shape, np.float16), name) for name, shape in factors]
node = helper.make_node("Monarch", ["x", "R", "L"], ["y"], domain="treeq", name="branch",
                        plugin_namespace="treeq", plugin_version="1")
values = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, [4, 32]) for n in "xy"]
graph = helper.make_graph([node], "g", values[:1], values[1:], weights)
opsets = [helper.make_opsetid("", 21), helper.make_opsetid("treeq", 1)]
model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
print("parsing", flush=True)
assert parser.parse(model.SerializeToString())
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM80, 0)
print("built", builder.build_serialized_network(network, config).nbytes > 0)
"""


def run_child(cure: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", CHILD, cure],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_parser_works_with_the_cure():
    done = run_child("with")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["parsing", "built True"]


def test_the_parser_still_aborts_without_the_cure():
    """The trap that the cure is for. If this fails, this version no longer needs the cure."""
    done = run_child("without")
    assert done.stdout.startswith("parsing")
    if done.returncode == 0:
        pytest.fail("this TensorRT-RTX parses plugins without the cure: drop _cure_parser")
    assert done.returncode == -6  # SIGABRT
    assert "terminate called" in done.stderr


def test_the_runtime_is_loaded_once_with_its_version():
    runtime = load_runtime("tensorrt-rtx")
    assert runtime is load_runtime("tensorrt-rtx")
    assert runtime.version == runtime.module.__version__
    assert runtime.parser_error is None
    require_parser(runtime)
    ctypes.CDLL(PARSER_OPENS)


def test_a_parser_that_would_abort_is_not_called():
    runtime = Runtime("tensorrt-rtx", None, "1.7", parser_error="OSError: no memory")
    with pytest.raises(RunnerError, match=r"would abort.*no memory.*LD_LIBRARY_PATH") as error:
        require_parser(runtime)
    assert "\n" not in str(error.value)


def test_a_cure_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensorrt_library, "PARSER_OPENS", "libtreeq_nowhere.so")
    error = tensorrt_library._cure_parser()
    assert error == "FileNotFoundError: no libtreeq_nowhere.so.* is loaded"


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(RunnerError, match=r"pip install 'treeq-export\[tensorrt\]'"):
        load_runtime("tensorrt")


def test_the_stub_is_a_library_of_that_name(tmp_path: Path):
    path = tmp_path / "stub"
    path.write_bytes(stub_library("libtreeq_stub.so", "libc.so.6", 62))
    read = subprocess.run(
        ["readelf", "--dynamic", "--program-headers", path],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "soname: [libtreeq_stub.so]" in read.stdout
    assert "Shared library: [libc.so.6]" in read.stdout
    assert "GNU_STACK" in read.stdout
    assert read.stderr == ""
    with pytest.raises(OSError, match="libtreeq_stub"):
        ctypes.CDLL("libtreeq_stub.so")
    tensorrt_library._load_stub("libtreeq_stub.so", "libc.so.6")
    assert ctypes.CDLL("libtreeq_stub.so").getpid() > 0  # of the library that it needs
