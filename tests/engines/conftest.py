"""Fixtures of the build tests: a compiled run of the digits sample, and graphs made by hand."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from treeq_export.engines.engine import BuildOrder, BuildResult, build_engine
from treeq_export.engines.graph_facts import GraphFacts, read_facts
from treeq_export.engines.layer_list import EngineLayer, parse_layers
from treeq_export.runners.graph_meta import LAYERS_KEY

K, N, ROWS = 64, 32, 16


@pytest.fixture(scope="session")
def digits_run(make_digits_run: Callable[..., Path]) -> Path:
    """The digits sample, W4A4 with branches, compiled for both targets of TensorRT. Read-only."""
    return make_digits_run("tensorrt", "tensorrt-native")


@pytest.fixture
def copied_run(digits_run: Path, tmp_path: Path) -> Path:
    """A copy of `digits_run` to change."""
    return Path(shutil.copytree(digits_run, tmp_path / "run"))


Weights = Mapping[str, NDArray[Any]]


class HandGraph:
    """An ONNX graph made by hand, with the metadata of a compiled one.

    Args:
        folder: Where it is written.
        layers: Names that its metadata lists as quantized layers.
        rows: Tokens, fixed; None is a dynamic batch.
    """

    def __init__(self, folder: Path, layers: tuple[str, ...], rows: int | None = ROWS) -> None:
        self.folder = folder
        self.layers = layers
        self.rows = rows
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}
        self.outputs: list[str] = []

    def constant(self, name: str, array: NDArray[Any]) -> str:
        """Add an initializer."""
        self.weights[name] = numpy_helper.from_array(array, name)
        return name

    def node(self, op_type: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Add a node; its output has its name."""
        self.nodes.append(helper.make_node(op_type, inputs, [f"{name}:0"], name=name, **attributes))
        return f"{name}:0"

    def dequantized_weight(self, layer: str, dtype: type[np.floating[Any]] = np.float32) -> str:
        """Add an INT8 weight (K, N) with its scales and their DequantizeLinear."""
        codes = np.arange(K * N, dtype=np.int64).reshape(K, N) % 7 - 3
        codes = self.constant(f"{layer}.weight_quantized", codes.astype(np.int8))
        scale = self.constant(f"{layer}.weight_quantized_scale", np.full(N, 0.1, dtype))
        return self.node("DequantizeLinear", [codes, scale], f"{layer}/weight", axis=1)

    def int8_layer(self, layer: str, x: str = "x") -> str:
        """Add a layer with static activation scales: an Int8 gemm."""
        full = self.node("Cast", [x], f"{layer}/full", to=TensorProto.FLOAT)
        scale = self.constant(f"{layer}.act_scale", np.array(0.05, np.float32))
        codes = self.node("QuantizeLinear", [full, scale], f"{layer}/codes", output_dtype=3)
        back = self.node("DequantizeLinear", [codes, scale], f"{layer}/back")
        weight = self.dequantized_weight(layer)
        return self.finish(self.node("MatMul", [back, weight], f"{layer}/product"))

    def half_layer(self, layer: str, x: str = "x") -> str:
        """Add a layer of which only the weight is quantized: a Half gemm."""
        weight = self.dequantized_weight(layer, np.float16)
        return self.finish(self.node("MatMul", [x, weight], f"{layer}/product"))

    def token_scale_layer(self, layer: str, x: str = "x") -> str:
        """Add a layer quantized with a scale per token computed at run time, by axis 0 of Q/DQ."""
        full = self.node("Cast", [x], f"{layer}/full", to=TensorProto.FLOAT)
        size = self.node("Abs", [full], f"{layer}/abs")
        most = self.node(
            "ReduceMax", [size, self.constant("last", np.array([1]))], f"{layer}/max", keepdims=0
        )
        one = self.constant("qmax", np.array(127, np.float32))
        scale = self.node("Div", [most, one], f"{layer}/scale")
        codes = self.node("QuantizeLinear", [full, scale], f"{layer}/codes", axis=0, output_dtype=3)
        back = self.node("DequantizeLinear", [codes, scale], f"{layer}/back", axis=0)
        weight = self.dequantized_weight(layer)
        return self.finish(self.node("MatMul", [back, weight], f"{layer}/product"))

    def plugin_layer(self, layer: str, x: str = "x") -> str:
        """Add a `treeq::QLinear` node."""
        rng = np.random.default_rng(0)
        planes = rng.integers(-(2**31), 2**31, (3, N, K // 32), dtype=np.int64).astype(np.int32)
        inputs = [
            x,
            self.constant(f"{layer}.planes", planes),
            self.constant(f"{layer}.weight_scale", np.ones((N, 1), np.float32)),
        ]
        output = self.node(
            "QLinear",
            inputs,
            layer,
            domain="treeq",
            plugin_namespace="treeq",
            plugin_version="1",
            weight_bits=3,
            act_bits=3,
            act_scale="token_rms",
            act_step=0.6,
            rotation_group=64,
            group_size=0,
            in_features=K,
            out_features=N,
        )
        return self.finish(output)

    def finish(self, value: str) -> str:
        """Make a value an output."""
        self.outputs.append(value)
        return value

    def save(self) -> Path:
        """Write the model."""
        rows = "batch" if self.rows is None else self.rows
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, [rows, K])
        outputs = [
            helper.make_tensor_value_info(
                name, TensorProto.FLOAT if "product" in name else TensorProto.FLOAT16, [rows, N]
            )
            for name in self.outputs
        ]
        for output in outputs:
            if not any(n.op_type == "Cast" for n in self.nodes) and "product" in output.name:
                output.type.tensor_type.elem_type = TensorProto.FLOAT16
        graph = helper.make_graph(self.nodes, "hand", [x], outputs, list(self.weights.values()))
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("treeq", 1)]
        model = helper.make_model(graph, opset_imports=opsets)
        model.ir_version = 10
        sites = [{"name": name, "input": "", "output": "", "node": name} for name in self.layers]
        helper.set_model_props(model, {LAYERS_KEY: json.dumps(sites)})
        path = self.folder / "model.onnx"
        onnx.save(model, path)
        return path


@pytest.fixture
def make_graph(tmp_path: Path) -> Callable[..., HandGraph]:
    """A function: names of the planned layers -> an empty graph."""

    def make(*layers: str, rows: int | None = ROWS) -> HandGraph:
        return HandGraph(tmp_path, layers, rows)

    return make


@pytest.fixture
def build_graph(tmp_path: Path) -> Callable[..., tuple[GraphFacts, list[EngineLayer]]]:
    """A function: a graph -> its facts and the layers of its engine for sm_89."""

    def build(graph: HandGraph) -> tuple[GraphFacts, list[EngineLayer]]:
        path = graph.save()
        facts = read_facts(path, max_batch=8)
        order_and_build(path, facts, tmp_path)
        return facts, parse_layers((tmp_path / "layers.txt").read_text())

    return build


def order_and_build(path: Path, facts: GraphFacts, folder: Path) -> BuildResult:
    """Build a graph for sm_89 into a folder."""
    order = BuildOrder(
        runtime="tensorrt-rtx",
        gpu="sm_89",
        graph=str(path),
        profile=facts.profile,
        folder=str(folder),
    )
    return build_engine(order, None, lambda _: None)
