from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from treeq_export.compile.passes.fuse_attention import FuseAttention
from treeq_export.runners.ort_runner import OrtRunner

HEADS, SIZE, TOKENS, FACTOR = 2, 32, 5, 32**-0.25


class Sketch:
    """A graph of q, k and v (batch, tokens, 64), built value by value; constants have names."""

    def __init__(self, tokens_of_k: int = TOKENS) -> None:
        lengths = {"q": TOKENS, "k": tokens_of_k, "v": tokens_of_k}
        inputs = [
            ir.val(name, ir.DataType.FLOAT, ["batch", length, HEADS * SIZE])
            for name, length in lengths.items()
        ]
        graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 21}, name="hand")
        self.tape, self.graph = ir.tape.Tape(graph), graph

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self.tape.op(op_type, inputs, attributes)

    def constant(self, *entries: Any) -> ir.Value:
        name = f"c{len(self.graph.initializers)}"
        return self.tape.initializer(ir.tensor(entries), name)

    def split(self, x: ir.Value, heads: int = HEADS) -> ir.Value:
        """Append (batch, tokens, K) -> (batch, heads, tokens, size)."""
        shape = self.constant(0, 0, heads, HEADS * SIZE // heads)
        return self.op("Transpose", self.op("Reshape", x, shape), perm=[0, 2, 1, 3])

    def scaled(self, x: ir.Value) -> ir.Value:
        """Append x FACTOR."""
        return self.op("Mul", x, self.constant(FACTOR))

    def turn(self, k: ir.Value) -> ir.Value:
        """Append k with its last two axes swapped, as the exporter writes it."""
        shape = self.op("Shape", k)
        lead, tokens, size = (
            self.op("Slice", shape, self.constant(begin), self.constant(end))
            for begin, end in ((0, 2), (2, 3), (3, 4))
        )
        merged = self.op("Concat", self.constant(-1), tokens, size, axis=0)
        swapped = self.op("Concat", lead, size, tokens, axis=0)
        flat = self.op("Transpose", self.op("Reshape", k, merged), perm=[0, 2, 1])
        return self.op("Reshape", flat, swapped)

    def finish(self, product: ir.Value, *shape: int) -> ir.Model:
        """Append (batch, heads, tokens, size) -> (batch, tokens, K) as the output "y"."""
        joined = self.op("Transpose", product, perm=[0, 2, 1, 3])
        y = self.op("Reshape", joined, self.constant(*(shape or (0, 0, HEADS * SIZE))))
        y.name = "y"
        self.graph.outputs.append(y)
        model = ir.Model(self.graph, ir_version=10)
        ShapeInferencePass()(model)
        return model


def make_attention(
    *,
    exported: bool = False,
    tokens_of_k: int = TOKENS,
    heads: tuple[int, int, int] = (HEADS, HEADS, HEADS),
    out_shape: tuple[int, ...] = (),
    both_scaled: bool = True,
) -> ir.Model:
    """Return Softmax((q s) (k s)^T) v."""
    sketch = Sketch(tokens_of_k)
    q, k, v = (sketch.split(x, n) for x, n in zip(sketch.graph.inputs, heads, strict=True))
    k = sketch.turn(k) if exported else sketch.op("Transpose", k, perm=[0, 1, 3, 2])
    scores = sketch.op("MatMul", sketch.scaled(q), sketch.scaled(k) if both_scaled else k)
    product = sketch.op("MatMul", sketch.op("Softmax", scores, axis=-1), v)
    return sketch.finish(product, *out_shape)


def make_feeds(model: ir.Model) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    return {
        str(x.name): rng.standard_normal((3, *x.shape[1:])).astype(np.float32)
        for x in model.graph.inputs
        if x.shape is not None
    }


def run(model: ir.Model) -> Any:
    serialized = ir.to_proto(model).SerializeToString()
    with OrtRunner(serialized, threads=1, use_kernels=False) as runner:
        return runner.run(make_feeds(model))


@pytest.mark.parametrize("both_scaled", [True, False])
@pytest.mark.parametrize("tokens_of_k", [TOKENS, 7])
@pytest.mark.parametrize("exported", [False, True])
def test_attention_becomes_one_node(exported: bool, tokens_of_k: int, both_scaled: bool):
    model = make_attention(exported=exported, tokens_of_k=tokens_of_k, both_scaled=both_scaled)
    before = run(model)
    shape = model.graph.outputs[0].shape
    assert FuseAttention()(model).modified
    [node] = model.graph
    assert (node.domain, node.op_type) == ("com.microsoft", "MultiHeadAttention")
    assert model.opset_imports["com.microsoft"] == 1
    assert list(node.inputs) == list(model.graph.inputs)
    assert node.attributes["num_heads"].as_int() == HEADS
    expected = FACTOR**2 if both_scaled else FACTOR
    assert node.attributes["scale"].as_float() == pytest.approx(expected)
    [y] = model.graph.outputs
    assert y is node.outputs[0]
    assert (y.name, y.dtype, y.shape) == ("y", ir.DataType.FLOAT, shape)
    assert not model.graph.initializers
    np.testing.assert_allclose(run(model), before, rtol=1e-5, atol=1e-5)
    assert not FuseAttention()(model).modified
    assert list(model.graph) == [node]


def find(model: ir.Model, op_type: str, index: int = 0) -> ir.Node:
    return [node for node in model.graph if node.op_type == op_type][index]


def put_behind(model: ir.Model, value: ir.Value, op_type: str, *others: ir.Value) -> None:
    """Let all readers of a value read op_type(value, *others)."""
    users = list(value.uses())
    new = ir.node(op_type, [value, *others])
    y = new.outputs[0]
    y.type, y.shape = value.type, value.shape
    for use in users:
        use.node.replace_input_with(use.idx, y)
    producer = value.producer()
    assert producer is not None
    model.graph.insert_after(producer, new)


def put_mask(model: ir.Model) -> None:
    mask = ir.val("mask", ir.DataType.FLOAT, [1, 1, TOKENS, TOKENS])
    model.graph.inputs.append(mask)
    put_behind(model, find(model, "MatMul").outputs[0], "Add", mask)


def put_norm(index: int) -> Callable[[ir.Model], None]:
    """Return what puts a norm over the size of a head between Reshape and Transpose."""

    def spoil(model: ir.Model) -> None:
        weight = ir.val("weight", const_value=ir.tensor(np.ones(SIZE, np.float32)))
        model.graph.register_initializer(weight)
        value = find(model, "Reshape", index).outputs[0]
        put_behind(model, value, "LayerNormalization", weight)

    return spoil


def put_relu(op_type: str, index: int = 0) -> Callable[[ir.Model], None]:
    def spoil(model: ir.Model) -> None:
        put_behind(model, find(model, op_type, index).outputs[0], "Relu")

    return spoil


def give_out(op_type: str, index: int = 0) -> Callable[[ir.Model], None]:
    def spoil(model: ir.Model) -> None:
        model.graph.outputs.append(find(model, op_type, index).outputs[0])

    return spoil


def read_softmax_again(model: ir.Model) -> None:
    y = ir.tape.Tape(model.graph).op("Relu", [find(model, "Softmax").outputs[0]])
    model.graph.outputs.append(y)


def set_attribute(op_type: str, name: str, value: Any, index: int = 0) -> Any:
    def spoil(model: ir.Model) -> None:
        attribute = ir.convenience.convert_attribute(name, value)
        find(model, op_type, index).attributes.add(attribute)

    return spoil


def compute_factor(model: ir.Model) -> None:
    """Let the factor of q be computed from the inputs."""
    first = ir.tape.Tape(model.graph).op("ReduceMax", [model.graph.inputs[0]], {"keepdims": 0})
    find(model, "Mul").replace_input_with(1, first)
    model.graph.sort()


OTHERS: dict[str, Callable[[ir.Model], None]] = {
    "mask": put_mask,
    "norm of q": put_norm(0),
    "norm of k": put_norm(1),
    "values changed": put_relu("Transpose", 2),
    "q changed behind its factor": put_relu("Mul", 0),
    "weights changed": put_relu("Softmax"),
    "product changed": put_relu("MatMul", 1),
    "weights read elsewhere": read_softmax_again,
    "weights given out": give_out("Softmax"),
    "product given out": give_out("MatMul", 1),
    "softmax over queries": set_attribute("Softmax", "axis", 2),
    "heads of q last": set_attribute("Transpose", "perm", [0, 1, 2, 3], 0),
    "k as it is": set_attribute("Transpose", "perm", [0, 1, 2, 3], 3),
    "heads not joined": set_attribute("Transpose", "perm", [0, 1, 2, 3], 4),
    "factor that is computed": compute_factor,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_forms_stay(name: str):
    model = make_attention()
    OTHERS[name](model)
    before = list(model.graph)
    assert not FuseAttention()(model).modified
    assert list(model.graph) == before
    assert "com.microsoft" not in model.opset_imports


def test_inner_values_that_are_read_elsewhere_are_computed_still():
    """The scores are not on the way from q, k and v to y any more, but their other reader is."""
    model = make_attention()
    scores = find(model, "MatMul").outputs[0]
    scores.name = "scores"
    model.graph.outputs.append(scores)
    assert FuseAttention()(model).modified
    assert model.graph.outputs[1] is scores
    op_types = [node.op_type for node in model.graph]
    assert op_types.count("MatMul") == 1
    assert "Softmax" not in op_types


def test_values_that_all_heads_share_stay():
    model = make_attention(heads=(HEADS, HEADS, 1), out_shape=(0, 0, HEADS * HEADS * SIZE))
    assert run(model).shape == (3, TOKENS, HEADS * HEADS * SIZE)
    assert not FuseAttention()(model).modified


@pytest.mark.parametrize("index", [-3, -2])
def test_reshape_of_k_to_another_shape_than_its_own_is_no_swap(index: int):
    model = make_attention(exported=True)
    shape = ir.val("fixed", const_value=ir.tensor([-1, HEADS, SIZE, TOKENS][index + 2 :]))
    model.graph.register_initializer(shape)
    find(model, "Reshape", index).replace_input_with(1, shape)
    assert not FuseAttention()(model).modified


def test_other_turn_of_k_between_its_reshapes_is_no_swap():
    model = make_attention(exported=True)
    [turn] = [n for n in model.graph if list(n.attributes.get_ints("perm", ())) == [0, 2, 1]]
    turn.attributes.add(ir.AttrInt64s("perm", [0, 1, 2]))
    assert not FuseAttention()(model).modified


def test_y_of_another_shape_stays():
    """(batch, tokens * heads, size) is not what MultiHeadAttention gives."""
    model = make_attention(out_shape=(0, TOKENS * HEADS, SIZE))
    before = run(model)
    FuseAttention()(model)
    assert model.graph.outputs[0].shape == ir.Shape(["batch", TOKENS * HEADS, SIZE])
    np.testing.assert_allclose(run(model), before, rtol=1e-5, atol=1e-5)
