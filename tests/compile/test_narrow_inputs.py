from typing import Any

import numpy as np
import onnx_ir as ir

from treeq_export.compile.passes.narrow_inputs import NarrowInputs
from treeq_export.runners.ort_runner import OrtRunner


def make_gather() -> ir.Model:
    table = ir.val("table", const_value=ir.tensor(np.arange(8, dtype=np.float32), name="table"))
    rows = ir.val("class_labels", ir.DataType.INT64, ["batch"])
    gather = ir.node("Gather", [table, rows])
    double = ir.node("Add", [rows, rows])
    for node, name, dtype in (
        (gather, "y", ir.DataType.FLOAT),
        (double, "twice", ir.DataType.INT64),
    ):
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(dtype)
        node.outputs[0].shape = ir.Shape(["batch"])
    graph = ir.Graph(
        [rows],
        [gather.outputs[0], double.outputs[0]],
        nodes=[gather, double],
        initializers=[table],
        opset_imports={"": 21},
        name="g",
    )
    return ir.Model(graph, ir_version=10)


def test_input_is_int32_with_one_cast_behind():
    model = make_gather()
    assert NarrowInputs()(model).modified
    [labels] = model.graph.inputs
    assert (labels.name, labels.dtype) == ("class_labels", ir.DataType.INT32)
    cast = model.graph[0]
    assert (cast.op_type, [use.node for use in labels.uses()]) == ("Cast", [cast])
    assert cast.outputs[0].dtype == ir.DataType.INT64
    assert [node.op_type for node in model.graph] == ["Cast", "Gather", "Add"]


def test_runner_narrows_what_it_is_fed():
    model = make_gather()
    NarrowInputs()(model)
    labels = np.array([3, 0, 7])
    assert labels.dtype == np.int64
    with OrtRunner(ir.to_proto(model).SerializeToString()) as runner:
        results = runner.run_all({"class_labels": labels})
    np.testing.assert_array_equal(results["y"], [3, 0, 7])
    np.testing.assert_array_equal(results["twice"], [6, 0, 14])


def test_other_inputs_are_left_alone(make_layer: Any, make_model: Any):
    model = make_model(make_layer())
    before = list(model.graph)
    assert not NarrowInputs()(model).modified
    assert list(model.graph) == before
