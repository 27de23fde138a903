"""The definition of a FusedQLinear against numpy, and whole blocks and models in the ort target."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from tests.hand_layers import lower
from treeq_export.compile.bodies.form import Form, make_function
from treeq_export.compile.graph.fused import widen
from treeq_export.compile.graph.signature import QLinearSignature
from treeq_export.compile.passes.add_function_bodies import AddFunctionBodies
from treeq_export.ops import FUSED, ActScale
from treeq_export.quant.branch import apply_branch
from treeq_export.runners.graph_meta import read_layers
from treeq_export.runners.kernel_probe import KernelProbe
from treeq_export.runners.layer_probe import LayerProbe
from treeq_export.runners.ort_runner import OrtRunner

Make = Callable[..., Any]
Array = NDArray[np.float32]
SIGNATURE = QLinearSignature(4, 4, ActScale.TOKEN_RMS, 0.25, 32, 0, 64, 96, 3, has_bias=True)
FORM = Form(
    FUSED,
    SIGNATURE,
    branch=None,
    norm_epsilon=None,
    activation="none",
    is_gated=False,
    num_outputs=1,
    num_inputs=4,
)


def run(model: ir.Model, feeds: dict[str, Any], *, use_kernels: bool) -> dict[str, Array]:
    """Return all outputs; the model has to pass onnx.checker."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    with OrtRunner(proto.SerializeToString(), threads=1, use_kernels=use_kernels) as runner:
        return runner.run_all(feeds)


def assert_close(received: Array, expected: Array) -> None:
    """To 1e-5 of the largest value: float32 sums in another order, and no code that flipped."""
    np.testing.assert_allclose(received, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


OPTIONS: dict[str, dict[str, Any]] = {
    "branch": {"branch": ((1, 64, 4), (1, 4, 96)), "num_inputs": 6},
    "other branch": {"branch": ((2, 32, 4), (2, 4, 48)), "num_inputs": 6},
    "norm": {"norm_epsilon": 1e-6, "num_inputs": 8},
    "other epsilon": {"norm_epsilon": 1e-5, "num_inputs": 8},
    "gelu": {"activation": "gelu_tanh"},
    "gate": {"is_gated": True, "num_inputs": 10},
    "two outputs": {"num_outputs": 2},
    "three outputs": {"num_outputs": 3},
}


def test_every_form_has_an_overload_of_its_own():
    forms = [FORM, *(Form(**vars(FORM) | options) for options in OPTIONS.values())]
    names = [form.overload for form in forms]
    assert len(set(names)) == len(forms)
    for form, name in zip(forms, names, strict=True):
        function = make_function(form)
        assert function.identifier() == ("treeq", "FusedQLinear", name)
        assert [value.name for value in function.inputs] == list(FUSED.inputs[: form.num_inputs])
        assert len(function.outputs) == form.num_outputs


def gelu(x: Any) -> Any:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


class Fusion:
    """A layer with everything around it, or some of it, and what numpy makes of it."""

    def __init__(self, layer: Any, branch: Any, parts: set[str]) -> None:
        self.layer, self.branch, self.parts = layer, branch, parts
        rng = np.random.default_rng(11)
        n = len(layer.codes)
        shapes = {
            "norm_scale": (2, 64),
            "norm_shift": (2, 64),
            "gate": (2, n),
            "residual": (2, 3, n),
        }
        self.feeds = {
            name: rng.standard_normal(shape).astype(np.float32)
            for name, shape in shapes.items()
            if name.split("_")[0] in parts or (name == "residual" and "gate" in parts)
        }

    def make(self, make_model: Make) -> ir.Model:
        """Return the model, with function bodies."""
        model = make_model(self.layer)
        graph, node = model.graph, model.graph[0]
        attributes: dict[str, Any] = {}
        inputs: dict[str, ir.Value | None] = {}
        for name, array in self.feeds.items():
            shape = ["batch", *array.shape[1:]]
            graph.inputs.append(ir.val(name, ir.DataType.FLOAT, shape))
            inputs[name] = graph.inputs[-1]
        if "norm" in self.parts:
            attributes["norm_epsilon"] = 1e-6
        if "gelu" in self.parts:
            attributes["activation"] = "gelu_tanh"
        if "branch" in self.parts:
            _, values = self.branch.make_node(graph.inputs[0])
            for value in values:
                graph.register_initializer(value)
            inputs |= dict(zip(("branch_R", "branch_L"), values, strict=True))
        widen(graph, node, inputs, list(node.outputs), **attributes)
        AddFunctionBodies(half=False)(model)
        return model

    def expected(self) -> Any:
        """Return y of `fused.py`'s formula."""
        x, layer = self.layer.x, self.layer
        if "norm" in self.parts:
            scale, shift = self.feeds["norm_scale"][:, None], self.feeds["norm_shift"][:, None]
            centred = x - x.mean(-1, keepdims=True, dtype=np.float64)
            norm = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
            layer.x = (norm * (1 + scale) + shift).astype(np.float32)
        y = layer.expected
        if "branch" in self.parts:
            y = y + apply_branch(layer.x, self.branch.R, self.branch.L)
        layer.x = x
        if "gelu" in self.parts:
            y = gelu(y)
        if "gate" in self.parts:
            y = self.feeds["residual"] + self.feeds["gate"][:, None] * y
        return y


PARTS = [
    set(),
    {"norm"},
    {"branch"},
    {"gelu"},
    {"gate"},
    {"gelu", "gate"},
    {"norm", "branch", "gelu", "gate"},
]


@pytest.mark.parametrize("use_kernels", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "+".join(sorted(parts)) or "plain")
def test_node_computes_the_formula(
    parts: set[str],
    bias: bool,
    use_kernels: bool,
    make_layer: Make,
    make_branch: Make,
    make_model: Make,
):
    fusion = Fusion(make_layer(n=12, bias=bias), make_branch(2, 3, 2), parts)
    model = fusion.make(make_model)
    assert len(model.graph) == 1
    [y] = run(model, {"x": fusion.layer.x} | fusion.feeds, use_kernels=use_kernels).values()
    assert_close(y, fusion.expected())


def test_parts_are_functions_beside_it(make_layer: Make, make_branch: Make, make_model: Make):
    model = Fusion(make_layer(n=12), make_branch(2, 3, 2), {"branch"}).make(make_model)
    [node] = model.graph
    linear = node.attributes["linear_function"].as_string()
    branch = node.attributes["branch_function"].as_string()
    assert set(model.functions) == {
        ("treeq", "FusedQLinear", node.overload),
        ("treeq", "QLinear", linear),
        ("treeq", "Monarch", branch),
    }


class Block:
    """A Diffusion Transformer block by hand: adaLN, attention and two linears with branches."""

    WIDTH, TOKENS, HEADS = 64, 3, 2
    ROWS = ("shift1", "scale1", "gate1", "shift2", "scale2", "gate2")

    def __init__(self, make_layer: Make, make_branch: Make) -> None:
        self.layers, self.branches = {}, {}
        sizes = dict.fromkeys(("q", "k", "v", "out"), (64, 64)) | {
            "fc1": (64, 128),
            "fc2": (128, 64),
        }
        for seed, (name, (k, n)) in enumerate(sizes.items()):
            full = f"blocks.0.{name}"
            self.layers[name] = make_layer(k=k, n=n, seed=seed, name=full)
            branch = make_branch(1, 1, 4, k=k, n=n, name=full)
            branch.R *= 0.05 + 0.01 * seed  # of the size of what quantization leaves, all unlike
            self.branches[name] = branch

    def feeds(self, seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        rows = {name: 0.5 * rng.standard_normal((2, self.WIDTH)) for name in self.ROWS}
        arrays = {"x": rng.standard_normal((2, self.TOKENS, self.WIDTH))} | rows
        return {name: array.astype(np.float32) for name, array in arrays.items()}

    def make(self) -> ir.Model:
        """Return the block as the exporter writes it; its output is "y"."""
        x = ir.val("x", ir.DataType.FLOAT, ["batch", self.TOKENS, self.WIDTH])
        rows = [ir.val(name, ir.DataType.FLOAT, ["batch", self.WIDTH]) for name in self.ROWS]
        opsets = {"": 21, "treeq": 1}
        self.graph = ir.Graph([x, *rows], [], nodes=[], opset_imports=opsets, name="block")
        self.tape = ir.tape.Tape(self.graph)
        self.axes = self.tape.initializer(ir.tensor([1]), "axes")
        self.ones = self.tape.initializer(ir.tensor(np.ones(self.WIDTH, np.float32)), "ones")
        row = dict(zip(self.ROWS, rows, strict=True))
        h = self.modulate(x, row["scale1"], row["shift1"])
        q, k, v = (self.linear(name, h) for name in "qkv")
        x = self.gate(x, row["gate1"], self.linear("out", self.attend(q, k, v)))
        h = self.modulate(x, row["scale2"], row["shift2"])
        h = self.op("Gelu", self.linear("fc1", h), approximate="tanh")
        y = self.gate(x, row["gate2"], self.linear("fc2", h))
        y.name = "y"
        self.graph.outputs.append(y)
        model = ir.Model(self.graph, ir_version=10)
        ShapeInferencePass()(model)
        return model

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self.tape.op(op_type, inputs, attributes)

    def linear(self, name: str, x: ir.Value) -> ir.Value:
        parts = []
        x.type = ir.TensorType(ir.DataType.FLOAT)
        x.shape = ir.Shape(["batch", self.TOKENS, self.layers[name].codes.shape[1]])
        for source in (self.layers[name], self.branches[name]):
            node, values = source.make_node(x)
            for value in values:
                self.graph.register_initializer(value)
            self.graph.append(node)
            parts.append(node.outputs[0])
        return self.op("Add", *parts)

    def modulate(self, x: ir.Value, scale: ir.Value, shift: ir.Value) -> ir.Value:
        norm = self.op("LayerNormalization", x, self.ones, axis=-1, epsilon=1e-6)
        one = self.tape.initializer(ir.tensor(np.float32(1)), f"one_{scale.name}")
        factor = self.op("Add", self.op("Unsqueeze", scale, self.axes), one)
        return self.op("Add", self.op("Mul", norm, factor), self.op("Unsqueeze", shift, self.axes))

    def gate(self, x: ir.Value, gate: ir.Value, y: ir.Value) -> ir.Value:
        return self.op("Add", x, self.op("Mul", self.op("Unsqueeze", gate, self.axes), y))

    def attend(self, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        size = self.WIDTH // self.HEADS
        split = self.tape.initializer(ir.tensor([0, 0, self.HEADS, size]), "split")
        joined = self.tape.initializer(ir.tensor([0, 0, self.WIDTH]), "joined")
        factor = self.tape.initializer(ir.tensor([np.float32(size**-0.25)]), "factor")
        q, k, v = (
            self.op("Transpose", self.op("Reshape", x, split), perm=[0, 2, 1, 3]) for x in (q, k, v)
        )
        k = self.op("Transpose", k, perm=[0, 1, 3, 2])
        scores = self.op("MatMul", self.op("Mul", q, factor), self.op("Mul", k, factor))
        product = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        return self.op("Reshape", self.op("Transpose", product, perm=[0, 2, 1, 3]), joined)


def test_block_is_five_nodes(make_layer: Make, make_branch: Make):
    model = lower(Block(make_layer, make_branch).make(), "ort")
    assert [(node.op_type, node.name) for node in model.graph if node.domain == "treeq"] == [
        ("FusedQLinear", f"blocks.0.{name}") for name in ("q+k+v", "out", "fc1", "fc2")
    ]
    assert [node.op_type for node in model.graph if node.domain != "treeq"] == [
        "MultiHeadAttention"
    ]
    present = [
        list(FUSED.inputs[FUSED.position("norm_scale") : len(node.inputs)])
        for node in model.graph
        if node.domain == "treeq"
    ]
    norm, gate = ["norm_scale", "norm_shift"], list(FUSED.inputs[-4:])
    assert present == [norm, gate, norm, gate]


@pytest.mark.parametrize("seed", [0, 1])
def test_block_computes_what_the_portable_one_does(seed: int, make_layer: Make, make_branch: Make):
    """With these seeds no code lies so near to a border that the order of float sums decides it."""
    block = Block(make_layer, make_branch)
    feeds = block.feeds(seed)
    portable = run(lower(block.make(), "portable"), feeds, use_kernels=False)["y"]
    packed = lower(block.make(), "ort")
    for use_kernels in (False, True):
        assert_close(run(packed, feeds, use_kernels=use_kernels)["y"], portable)


@pytest.fixture(scope="module")
def packed_dit(exported_dit: ir.Model) -> ir.Model:
    """The tiny DiT in the ort target. Read-only."""
    return lower(exported_dit.clone(), "ort")


def test_dit_has_five_nodes_a_block(packed_dit: ir.Model):
    names = [str(node.name) for node in packed_dit.graph if node.domain == "treeq"]
    parts = ["norm1.linear", "attn1.to_q+to_k+to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"]
    assert names == [f"transformer_blocks.{i}.{part}" for i in range(2) for part in parts]
    counts = Counter(node.op_type for node in packed_dit.graph)
    assert counts["FusedQLinear"] == 10
    assert counts["MultiHeadAttention"] == 2
    assert not {"QLinear", "Monarch", "Gelu", "Softmax"} & set(counts)
    # The one before proj_out_2, which is not quantized.
    assert counts["LayerNormalization"] == 1
    onnx.checker.check_model(ir.to_proto(packed_dit), full_check=True)


def test_sites_cover_every_layer_of_the_plan_once(packed_dit: ir.Model, compiled_dit: Any):
    sites = read_layers(packed_dit)
    layers = {layer.name: layer for layer in compiled_dit.plan.layers}
    assert sorted(site.name for site in sites) == sorted(layers)
    nodes = {node.name: node for node in packed_dit.graph if node.domain == "treeq"}
    channels = {name: node.attributes["out_features"].as_int() for name, node in nodes.items()}
    taken: Counter[str] = Counter()
    for site in sites:
        size = site.size or channels[site.node]
        assert size == layers[site.name].out_features
        assert site.offset == taken[site.node]
        taken[site.node] += size
    assert taken == channels
    values = set(ir.convenience.create_value_mapping(packed_dit.graph)) | {""}
    assert {value for site in sites for value in (site.input, site.output)} <= values


def dit_feeds(batch: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(4)
    return {
        "sample": rng.standard_normal((batch, 4, 8, 8)).astype(np.float32),
        "timestep": np.linspace(0, 900, batch).astype(np.float32),
        "class_labels": np.arange(batch),
    }


def test_dit_in_kernels_and_in_bodies(packed_dit: ir.Model, exported_dit: ir.Model):
    """A single code that falls to the other side of a border moves a row of 48 by a twentieth.

    That is below 1e-2 of all rows; here none does. What each layer computes is compared exactly
    below.
    """
    portable = lower(exported_dit.clone(), "portable")
    expected = run(portable, dit_feeds(), use_kernels=False)["prediction"]
    for use_kernels in (False, True):
        received = run(packed_dit, dit_feeds(), use_kernels=use_kernels)["prediction"]
        assert np.linalg.norm(received - expected) < 1e-2 * np.linalg.norm(expected)


def test_every_layer_alone_in_kernels_and_in_its_function(packed_dit: ir.Model):
    """The same codes and sums, each layer its own channels of a shared node."""
    rng = np.random.default_rng(9)
    nodes = {node.name: node for node in packed_dit.graph}
    for site in read_layers(packed_dit)[:7]:
        shape = nodes[site.node].inputs[0].shape
        x = rng.standard_normal([2, *shape[1:]]).astype(np.float32)
        kernel, function = KernelProbe(packed_dit, site), LayerProbe(packed_dit, site)
        (y, codes), (expected, expected_codes) = kernel.run_output(x), function.run_output(x)
        assert y.shape[-1] == site.size or not site.size
        np.testing.assert_array_equal(codes, expected_codes)
        np.testing.assert_array_equal(kernel.run_accumulators(x), function.run_accumulators(x))
        assert_close(y, expected)
