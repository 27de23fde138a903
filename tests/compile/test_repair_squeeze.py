import numpy as np
import onnx_ir as ir
import pytest

from treeq_export.compile.passes.repair_squeeze import RepairSqueeze


def make_squeeze(shape: list[int | str | None] | None, axes: list[int] | None) -> ir.Model:
    """x -> Relu -> Squeeze(axes) -> Neg."""
    x = ir.val("x", ir.DataType.FLOAT, shape)
    relu = ir.node("Relu", [x])
    relu.outputs[0].shape = None if shape is None else ir.Shape(shape)
    inputs, initializers = [relu.outputs[0]], []
    if axes is not None:
        initializers = [ir.val("axes", const_value=ir.tensor(np.array(axes, np.int64)))]
        inputs += initializers
    squeeze = ir.node("Squeeze", inputs, name="squeeze")
    neg = ir.node("Neg", [squeeze.outputs[0]], name="neg")
    graph = ir.Graph(
        [x],
        neg.outputs,
        nodes=[relu, squeeze, neg],
        initializers=initializers,
        opset_imports={"": 21},
        name="g",
    )
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("axes", [[1], [-2], [1, 2]])
def test_illegal_squeeze_becomes_identity(axes: list[int]):
    model = make_squeeze(["batch", 16, 32], axes)
    relu, squeeze, neg = model.graph
    assert RepairSqueeze()(model).modified
    assert list(model.graph) == [relu, squeeze, neg]
    assert squeeze.op_type == "Identity"
    assert list(squeeze.inputs) == [relu.outputs[0]]
    assert neg.inputs[0] is squeeze.outputs[0]
    assert not RepairSqueeze()(model).modified


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        (["batch", 1, 32], [1]),
        (["batch", 1, 32], [-2]),
        (["batch", 1, 1], [1, 2]),
        (["batch", None, 32], [1]),
        (["batch", "tokens", 32], [1]),
        (None, [1]),
        (["batch", 16, 32], None),
    ],
)
def test_legal_or_unknown_squeeze_is_kept(
    shape: list[int | str | None] | None, axes: list[int] | None
):
    model = make_squeeze(shape, axes)
    before = list(model.graph)
    assert not RepairSqueeze()(model).modified
    assert list(model.graph) == before
    assert before[2].inputs[0] is before[1].outputs[0]


def test_axes_that_are_computed_are_kept():
    model = make_squeeze(["batch", 16, 32], None)
    axes = ir.val("axes", ir.DataType.INT64, [1])
    model.graph.inputs.append(axes)
    squeeze = model.graph[1]
    squeeze.resize_inputs(2)
    squeeze.replace_input_with(1, axes)
    assert not RepairSqueeze()(model).modified
    assert squeeze in list(model.graph)


def test_legal_axes_of_a_mixed_squeeze_stay():
    model = make_squeeze(["batch", 1, 16, 1], [1, 2, -1])
    _, squeeze, neg = model.graph
    squeeze.outputs[0].name = "squeezed"
    assert RepairSqueeze()(model).modified
    assert squeeze.op_type == "Squeeze"
    axes = ir.convenience.get_const_tensor(squeeze.inputs[1])
    assert axes is not None
    assert axes.numpy().tolist() == [1, -1]
    assert neg.inputs[0] is squeeze.outputs[0]
    assert not RepairSqueeze()(model).modified


def test_illegal_squeeze_keeps_its_output():
    model = make_squeeze(["batch", 16, 32], [1])
    relu, squeeze, neg = model.graph
    squeeze.outputs[0].name = "prediction"
    model.graph.outputs[0] = squeeze.outputs[0]
    model.graph.remove(neg, safe=True)
    assert RepairSqueeze()(model).modified
    assert list(model.graph) == [relu, squeeze]
    assert model.graph.outputs[0] is squeeze.outputs[0]
    assert squeeze.op_type == "Identity"
    assert squeeze.outputs[0].name == "prediction"


def test_squeeze_of_another_domain_is_kept():
    model = make_squeeze(["batch", 16, 32], [1])
    model.graph[1].domain = "other"
    assert not RepairSqueeze()(model).modified
