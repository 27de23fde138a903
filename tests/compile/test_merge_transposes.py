from typing import Any

import numpy as np
import onnx_ir as ir

from tests.hand_layers import lower
from treeq_export.compile.graph.match import producer_of
from treeq_export.compile.passes.merge_transposes import MergeTransposes
from treeq_export.runners.ort_runner import OrtRunner


def make_chain(*perms: list[int], output_of_each: bool = False) -> ir.Model:
    x = ir.val("x", ir.DataType.FLOAT, [2, 3, 4])
    value, nodes = x, []
    for index, perm in enumerate(perms):
        node = ir.node("Transpose", [value], attributes={"perm": perm})
        value = node.outputs[0]
        value.name, value.type = f"t{index}", ir.TensorType(ir.DataType.FLOAT)
        nodes.append(node)
    last = ir.node("Neg", [value])
    last.outputs[0].name, last.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    outputs = [*(node.outputs[0] for node in nodes if output_of_each), last.outputs[0]]
    graph = ir.Graph([x], outputs, nodes=[*nodes, last], opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model) -> dict[str, Any]:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    with OrtRunner(ir.to_proto(model).SerializeToString()) as runner:
        return runner.run_all({"x": x})


def test_two_become_one():
    model = make_chain([2, 0, 1], [0, 2, 1])
    expected = run(model)["y"]
    assert MergeTransposes()(model).modified
    assert [node.op_type for node in model.graph] == ["Transpose", "Neg"]
    assert list(model.graph[0].attributes["perm"].as_ints()) == [2, 1, 0]
    np.testing.assert_array_equal(run(model)["y"], expected)


def test_three_that_move_nothing_go():
    model = make_chain([1, 2, 0], [1, 2, 0], [1, 2, 0])
    expected = run(model)["y"]
    MergeTransposes()(model)
    assert [node.op_type for node in model.graph] == ["Neg"]
    np.testing.assert_array_equal(run(model)["y"], expected)


def test_values_that_are_outputs_stay():
    model = make_chain([1, 0, 2], [1, 0, 2], output_of_each=True)
    expected = run(model)
    MergeTransposes()(model)
    received = run(model)
    assert list(received) == list(expected) == ["t0", "t1", "y"]
    for name, value in expected.items():
        np.testing.assert_array_equal(received[name], value)


def test_single_transpose_is_left_alone():
    model = make_chain([1, 0, 2])
    before = list(model.graph)
    assert not MergeTransposes()(model).modified
    assert list(model.graph) == before


def test_k_of_every_attention_is_turned_once(exported_dit: ir.Model):
    """From (batch, tokens, heads, size) to (batch, heads, size, tokens) in one Transpose."""
    model = exported_dit.clone()
    softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
    assert MergeTransposes()(model).modified
    for softmax in softmaxes:
        scores = producer_of(softmax.inputs[0], "MatMul")
        assert scores is not None
        scaled = producer_of(scores.inputs[1], "Mul")
        assert scaled is not None
        turned = producer_of(scaled.inputs[0], "Transpose")
        assert turned is not None
        assert list(turned.attributes["perm"].as_ints()) == [0, 2, 3, 1]
        assert producer_of(turned.inputs[0], "Reshape") is not None
    assert len(softmaxes) == 2
    # The shape arithmetic of the exporter's swap went with it.
    assert not [node for node in model.graph if node.op_type == "Shape"]


def test_result_is_unchanged(exported_dit: ir.Model, compiled_dit: Any):
    inputs = compiled_dit.denoiser.make_example_inputs(2, seed=0)
    results = []
    for rewrite in (False, True):
        model = exported_dit.clone()
        if rewrite:
            MergeTransposes()(model)
        lower(model, "portable")
        with OrtRunner(ir.to_proto(model).SerializeToString(), threads=1) as runner:
            results.append(runner.run(inputs))
    np.testing.assert_array_equal(*results)
