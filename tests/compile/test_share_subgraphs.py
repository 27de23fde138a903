from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from treeq_export.compile.passes.name_layers import NameLayers
from treeq_export.compile.passes.share_subgraphs import ShareSubgraphs
from treeq_export.runners.graph_meta import read_layers

Make = Callable[..., Any]
WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3)


def make_sums(*arrays: Any) -> ir.Model:
    """Return x + each array, an initializer "w0", "w1", ..., as an output each."""
    x = ir.val("x", ir.DataType.FLOAT, ["batch", 4, 3])
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="hand")
    tape = ir.tape.Tape(graph)
    for index, array in enumerate(arrays):
        value = tape.initializer(ir.tensor(array), f"w{index}")
        graph.outputs.append(tape.op(f"Op{index}", [x, value]))
    return ir.Model(graph, ir_version=10)


def put_embedder(tape: ir.tape.Tape, source: ir.Value, name: str, weight: Any) -> ir.Value:
    """Append Sigmoid(source @ weight) * source @ weight, with initializers of its own."""
    product = tape.op("MatMul", [source, tape.initializer(ir.tensor(weight), f"{name}.weight")])
    return tape.op("Mul", [product, tape.op("Sigmoid", [product])])


def make_embedders(first: Any, second: Any) -> ir.Model:
    """Return the sum of two embedders of t."""
    t = ir.val("t", ir.DataType.FLOAT, ["batch", 4])
    graph = ir.Graph([t], [], nodes=[], opset_imports={"": 21}, name="hand")
    tape = ir.tape.Tape(graph)
    parts = [put_embedder(tape, t, name, w) for name, w in (("a", first), ("b", second))]
    graph.outputs.append(tape.op("Add", parts))
    return ir.Model(graph, ir_version=10)


def test_equal_initializers_become_one():
    model = make_sums(WEIGHT, WEIGHT + 1, WEIGHT.copy(), np.ascontiguousarray(WEIGHT.T).T)
    kept = [model.graph.initializers[name] for name in ("w0", "w1")]
    assert ShareSubgraphs()(model).modified
    assert list(model.graph.initializers.values()) == kept
    assert [node.inputs[1].name for node in model.graph] == ["w0", "w1", "w0", "w0"]
    assert not ShareSubgraphs()(model).modified


def test_equal_bytes_of_another_type_or_shape_are_kept():
    zeros = np.zeros((4, 3), np.float32)
    model = make_sums(zeros, zeros.astype(np.int32), zeros[None], -zeros)
    assert not ShareSubgraphs()(model).modified
    assert list(model.graph.initializers) == ["w0", "w1", "w2", "w3"]


def test_initializer_that_is_an_output_is_kept():
    model = make_sums(WEIGHT, WEIGHT, WEIGHT)
    output = model.graph.initializers["w1"]
    model.graph.outputs.append(output)
    assert ShareSubgraphs()(model).modified
    assert list(model.graph.initializers) == ["w0", "w1"]
    assert model.graph.outputs[-1] is output


def test_equal_embedders_become_one():
    model = make_embedders(WEIGHT, WEIGHT.copy())
    assert ShareSubgraphs()(model).modified
    assert [node.op_type for node in model.graph] == ["MatMul", "Sigmoid", "Mul", "Add"]
    *_, embedded, add = model.graph
    assert list(add.inputs) == [embedded.outputs[0]] * 2
    assert not ShareSubgraphs()(model).modified


def test_embedders_that_differ_in_one_weight_stay():
    other = WEIGHT.copy()
    other[3, 2] = np.nextafter(other[3, 2], np.float32(100))
    model = make_embedders(WEIGHT, other)
    before = list(model.graph)
    assert not ShareSubgraphs()(model).modified
    assert list(model.graph) == before
    assert list(model.graph.initializers) == ["a.weight", "b.weight"]


def test_sites_name_the_values_that_are_left(make_layer: Make, make_model: Make):
    """In DiT every block's adaLN linear reads an embedding of its own, of which one is left."""
    layers = [make_layer(name=f"blocks.{i}.norm1.linear", rank=2, seed=i) for i in range(2)]
    model = make_model(*layers)
    weight, tape = np.eye(64, dtype=np.float32), ir.tape.Tape(model.graph)
    for node in list(model.graph):
        embedded = put_embedder(tape, model.graph.inputs[0], str(node.outputs[0].name), weight)
        embedded.shape = model.graph.inputs[0].shape
        node.replace_input_with(0, embedded)
    model.graph.sort()
    NameLayers()(model)
    ShareSubgraphs()(model)
    first, second = (node for node in model.graph if node.op_type == "QLinear")
    assert first.inputs[0] is second.inputs[0]
    sites = read_layers(model)
    assert [site.node for site in sites] == [first.name, second.name]
    assert {site.input for site in sites} == {first.inputs[0].name}


def test_layers_of_equal_weights_keep_a_node_each(make_layer: Make, make_model: Make):
    """Such as the adaLN linears of a model that starts from zeros."""
    model = make_model(*(make_layer(name=f"blocks.{i}.norm1.linear", rank=2) for i in range(2)))
    NameLayers()(model)
    assert ShareSubgraphs()(model).modified
    names = {node.name for node in model.graph}
    assert {site.node for site in read_layers(model)} <= names
