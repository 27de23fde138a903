from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from treeq_export.compile.graph.float_island import find_float_nodes
from treeq_export.compile.graph.value_types import FLOATS, HALF_MAX, infer_types
from treeq_export.compile.passes.check_patterns import CheckPatterns
from treeq_export.compile.passes.half_body import HalfBody
from treeq_export.quant.metrics import sqnr_db
from treeq_export.runners.ort_runner import OrtRunner

Make = Callable[..., Any]
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


class Builder:
    """A graph with the input x (batch, 8), written node by node."""

    def __init__(self) -> None:
        self.x = ir.val("x", FLOAT, ["batch", 8])
        self.graph = ir.Graph([self.x], [], nodes=[], opset_imports={"": 21, "treeq": 1}, name="g")

    def op(self, op_type: str, *inputs: ir.Value, dtype: ir.DataType = FLOAT, **more: Any) -> Any:
        node = ir.node(op_type, list(inputs), attributes=more, name=f"n{len(self.graph)}")
        value = node.outputs[0]
        value.name, value.type = f"v{len(self.graph)}", ir.TensorType(dtype)
        value.shape = self.x.shape
        self.graph.append(node)
        return value

    def store(self, name: str, array: Any) -> ir.Value:
        value = ir.val(name, const_value=ir.tensor(np.asarray(array), name=name))
        self.graph.register_initializer(value)
        return value

    def finish(self, *outputs: ir.Value) -> ir.Model:
        self.graph.outputs.extend(outputs)
        return ir.Model(self.graph, ir_version=10)


@pytest.fixture
def builder() -> Builder:
    return Builder()


def run_both(model: ir.Model, x: Any) -> tuple[Any, Any]:
    """Return the outputs of a float32 model before and after the pass."""
    before = ir.to_proto(model).SerializeToString()
    HalfBody()(model)
    CheckPatterns()(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    with OrtRunner(before) as full, OrtRunner(proto.SerializeToString()) as half:
        return full.run({"x": x}), half.run({"x": x})


def dtypes(model: ir.Model) -> dict[str, ir.DataType]:
    return {node.op_type: node.outputs[0].dtype for node in model.graph if node.op_type != "Cast"}


def test_inputs_and_outputs_keep_name_and_type(builder: Builder):
    y = builder.op("Mul", builder.x, builder.store("w", np.full(8, 2, np.float32)))
    y.name = "prediction"
    model = builder.finish(y)
    HalfBody()(model)
    assert [(value.name, value.dtype) for value in model.graph.inputs] == [("x", FLOAT)]
    assert [(value.name, value.dtype) for value in model.graph.outputs] == [("prediction", FLOAT)]
    assert [node.op_type for node in model.graph] == ["Cast", "Mul", "Cast"]
    assert model.graph.initializers["w"].dtype == HALF
    assert list(model.graph.initializers) == ["w"]


def test_an_output_that_is_read_inside_stays_readable(builder: Builder):
    first = builder.op("Neg", builder.x)
    second = builder.op("Abs", first)
    x = np.linspace(-2, 2, 16, dtype=np.float32).reshape(2, 8)
    model = builder.finish(first, second)
    full, half = run_both(model, x)
    np.testing.assert_allclose(half, full, atol=1e-3)
    assert [value.dtype for value in model.graph.outputs] == [FLOAT, FLOAT]


def test_timestep_sinusoid_stays_float32(builder: Builder):
    """981 * 1 rad in float16 is off by up to 0.25 rad; the float32 path is not."""
    frequencies = builder.store("frequencies", np.linspace(0.1, 1, 8, dtype=np.float32))
    angle = builder.op("Mul", builder.x, frequencies)
    y = builder.op("Add", builder.op("Sin", angle), builder.op("Cos", angle))
    model = builder.finish(y)
    full, half = run_both(model, np.array([[981.3] * 8, [3.0] * 8], np.float32))
    assert sqnr_db(full, half) > 60
    kinds = dtypes(model)
    assert (kinds["Mul"], kinds["Sin"], kinds["Cos"], kinds["Add"]) == (FLOAT, FLOAT, FLOAT, HALF)
    assert model.graph.initializers["frequencies"].dtype == FLOAT


@pytest.mark.parametrize("large", [40.0, 300.0, 2000.0])
def test_rms_norm_does_not_overflow(large: float, builder: Builder):
    """Squares beyond 65504 would give inf and a norm of 0."""
    two, epsilon = (builder.store(n, np.float32(v)) for n, v in (("two", 2), ("eps", 1e-6)))
    weight = builder.store("weight", np.linspace(0.5, 2, 8, dtype=np.float32))
    square = builder.op("Pow", builder.x, two)
    mean = builder.op("ReduceMean", square, builder.store("axes", np.array([-1])), keepdims=1)
    root = builder.op("Sqrt", builder.op("Add", mean, epsilon))
    y = builder.op("Mul", builder.x, builder.op("Reciprocal", root))
    y = builder.op("Mul", y, weight)
    for node in builder.graph:
        if node.op_type in ("ReduceMean", "Sqrt", "Reciprocal"):
            node.outputs[0].shape = ir.Shape(["batch", 1])
    builder.graph.node("n2").outputs[0].shape = ir.Shape(["batch", 1])
    model = builder.finish(y)
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32) * large / 4
    full, half = run_both(model, x)
    assert sqnr_db(full, half) > 60
    kinds = dtypes(model)
    assert kinds["Pow"] == kinds["ReduceMean"] == kinds["Sqrt"] == kinds["Reciprocal"] == FLOAT
    assert kinds["Mul"] == HALF


def test_decomposed_gelu_does_not_overflow(builder: Builder):
    """x^3 overflows float16 from 40 on; here x is 60."""
    three, cubic, root, one, half_ = (
        builder.store(name, np.float32(value))
        for name, value in (("c3", 3), ("c", 0.044715), ("r", 0.7978846), ("one", 1), ("h", 0.5))
    )
    cube = builder.op("Mul", builder.op("Pow", builder.x, three), cubic)
    inner = builder.op("Mul", builder.op("Add", builder.x, cube), root)
    gate = builder.op("Add", builder.op("Tanh", inner), one)
    y = builder.op("Mul", builder.op("Mul", builder.x, gate), half_)
    model = builder.finish(y)
    floats = {node.op_type for node in find_float_nodes(model.graph)}
    assert floats == {"Pow", "Mul", "Add", "Tanh"}
    x = np.linspace(-60, 60, 16, dtype=np.float32).reshape(2, 8)
    full, half = run_both(model, x)
    assert np.isfinite(half).all()
    assert sqnr_db(full, half) > 60


def test_shared_initializer_is_stored_twice(builder: Builder):
    shared = builder.store("shared", np.linspace(0.1, 1, 8, dtype=np.float32))
    wave = builder.op("Sin", builder.op("Mul", builder.x, shared))
    model = builder.finish(builder.op("Mul", wave, shared))
    full, half = run_both(model, np.ones((2, 8), np.float32))
    np.testing.assert_allclose(half, full, atol=1e-3)
    stored = {name: value.dtype for name, value in model.graph.initializers.items()}
    assert stored == {"shared": FLOAT, "shared/half": HALF}


def test_numbers_beyond_float16_stay_finite(builder: Builder):
    mask = builder.store("mask", np.array([0, -3.4e38, 1e6, -np.inf] * 2, np.float32))
    model = builder.finish(builder.op("Add", builder.x, mask))
    HalfBody()(model)
    stored = model.graph.initializers["mask"].const_value.numpy()
    np.testing.assert_array_equal(stored, np.array([0, -HALF_MAX, HALF_MAX, -np.inf] * 2))


def test_casts_and_constants_follow(builder: Builder):
    whole = builder.op("Cast", builder.x, dtype=ir.DataType.INT64, to=ir.DataType.INT64.value)
    back = builder.op("Cast", whole, to=FLOAT.value)
    constant = builder.op("Constant", value=ir.tensor(np.float32([1.5])))
    constant.shape = ir.Shape([1])
    model = builder.finish(builder.op("Add", back, constant))
    full, half = run_both(model, np.full((1, 8), 2.7, np.float32))
    np.testing.assert_array_equal(half, full)
    assert (back.dtype, constant.dtype, whole.dtype) == (HALF, HALF, ir.DataType.INT64)


def test_layers_keep_float32_scales(make_layer: Make, make_model: Make):
    model = make_model(make_layer())
    [node] = model.graph
    HalfBody()(model)
    kinds = [value.dtype for value in node.inputs]
    assert kinds == [HALF, ir.DataType.INT32, FLOAT, FLOAT]
    assert node.outputs[0].dtype == HALF


def test_every_node_of_a_whole_model_has_one_type(exported_dit: ir.Model):
    model = exported_dit.clone()
    HalfBody()(model)
    types = infer_types(model.graph)
    mixed = [
        node.name
        for node in model.graph
        if node.domain == "" and len({types.get(v) for v in node.inputs if v} & FLOATS) > 1
    ]
    assert mixed == []
    # Only the sinusoid is left in float32.
    floats = [n.op_type for n in model.graph if types.get(n.outputs[0]) == FLOAT]
    assert set(floats) <= {"Unsqueeze", "Mul", "Sin", "Cos", "Cast"}
    assert len(floats) <= 6
