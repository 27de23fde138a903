"""Load libtreeq_plugins.so into TensorRT-RTX and build an engine with it, without a GPU.

    python load_in_rtx.py LIBRARY STEP...

Steps, in order: dlopen, copy (dlopen LIBRARY.copy), import, load, drop (deregister), build. Prints
one JSON object: creators with their fields after each step, layers, bytes of the engine, and all
lines that were logged as errors.
"""

import ctypes
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

IN, OUT, BITS, RANK, BLOCKS, TOKENS = 1152, 1536, 3, 8, 4, 16
FIELDS = {
    "weight_bits": BITS,
    "act_bits": 3,
    "act_scale": "token_rms",
    "act_step": 0.6,
    "rotation_group": 128,
    "group_size": 0,
    "in_features": IN,
    "out_features": OUT,
}


def load_stub() -> None:
    """Load a library under the name that the ONNX parser opens, else the process ends there."""
    import tensorrt_rtx_libs

    folder = Path(str(tensorrt_rtx_libs.__file__)).parent
    with tempfile.TemporaryDirectory() as name:
        stub = Path(name) / "stub.so"
        options = ["-Wl,-soname,libtensorrt_rtx.so", "-Wl,--no-as-needed", f"-L{folder}"]
        command = ["gcc", "-shared", "-o", str(stub), *options, "-l:libtensorrt_rtx.so.1"]
        subprocess.run([*command, "-x", "c", "/dev/null"], check=True)
        ctypes.CDLL(str(stub))


def make_model() -> bytes:
    """Return y = QLinear(x, ..., Monarch(x, R, L)) as ONNX."""
    attributes: dict[str, Any] = {"plugin_version": "1", "plugin_namespace": "treeq"}
    weights = {
        "planes": np.ones((BITS, OUT, IN // 32), np.int32),
        "weight_scale": np.ones((OUT, 1), np.float32),
        "bias": np.ones(OUT, np.float32),
        "R": np.ones((BLOCKS, IN // BLOCKS, BLOCKS * RANK), np.float16),
        "L": np.ones((BLOCKS, BLOCKS * RANK, OUT // BLOCKS), np.float16),
    }
    nodes = [
        helper.make_node("Monarch", ["x", "R", "L"], ["z"], "branch", domain="treeq", **attributes),
        helper.make_node(
            "QLinear",
            ["x", "planes", "weight_scale", "bias", "z"],
            ["y"],
            "linear",
            domain="treeq",
            **attributes,
            **FIELDS,
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", TOKENS, IN])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["batch", TOKENS, OUT])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("treeq", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 10
    return model.SerializeToString()


def build(trt: Any, logger: Any) -> dict[str, Any]:
    """Parse the model and build an engine for three GPUs; return its layers and its bytes."""
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(make_model()):
        return {"parser": [str(parser.get_error(i)) for i in range(parser.num_errors)]}
    config = builder.create_builder_config()
    capabilities = ("SM80", "SM89", "SM120")
    config.num_compute_capabilities = len(capabilities)
    for index, name in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", *((batch, TOKENS, IN) for batch in (1, 4, 128)))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return {
        "plugins": [layer.name for layer in layers if layer.type == trt.LayerType.PLUGIN_V3],
        "engine_bytes": engine.nbytes if engine is not None else 0,
    }


def list_creators(registry: Any) -> dict[str, Any]:
    """Return {"namespace::name.version": [[field, type]]} of all creators with a namespace."""
    creators = [one for one in registry.all_creators if one.plugin_namespace]
    named = {
        f"{one.plugin_namespace}::{one.name}.{one.plugin_version}": [
            [field.name, field.type.name] for field in one.field_names
        ]
        for one in creators
    }
    assert len(named) == len(creators), "a creator is there twice"
    return named


class Host:
    """A process that uses TensorRT-RTX; one method a step."""

    def __init__(self, library: str) -> None:
        self.library = library
        self.errors: list[str] = []
        self.result: dict[str, Any] = {"errors": self.errors, "creators": []}
        self.trt: Any = None
        self.handle: Any = None

    @property
    def registry(self) -> Any:
        return self.trt.get_plugin_registry()

    def take_import(self) -> None:
        load_stub()
        trt: Any = importlib.import_module("tensorrt_rtx")
        errors = self.errors

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                if severity <= trt.ILogger.ERROR:
                    errors.append(text)

        self.trt, self.logger = trt, Logger()
        self.runtime = trt.Runtime(self.logger)  # the registry takes the first logger that it sees

    def take_dlopen(self) -> None:
        ctypes.CDLL(self.library)

    def take_copy(self) -> None:
        ctypes.CDLL(f"{self.library}.copy")

    def take_load(self) -> None:
        self.handle = self.registry.load_library(self.library)
        self.result["is_loaded"] = self.handle is not None

    def take_drop(self) -> None:
        self.registry.deregister_library(self.handle)

    def take_build(self) -> None:
        self.result |= build(self.trt, self.logger)


def main(library: str, *steps: str) -> None:
    """Take the steps and print what came of them."""
    host = Host(library)
    for step in steps:
        getattr(host, f"take_{step}")()
        if host.trt is not None:
            host.result["creators"].append(list_creators(host.registry))
    sys.stdout.write(json.dumps(host.result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
