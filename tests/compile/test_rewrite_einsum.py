import numpy as np
import onnx_ir as ir
import pytest

from treeq_export.compile.passes.rewrite_einsum import RewriteEinsum
from treeq_export.runners.ort_runner import OrtRunner


def make_einsum(equation: str, *shapes: list[int]) -> ir.Model:
    inputs = [ir.val(f"x{i}", ir.DataType.FLOAT, shape) for i, shape in enumerate(shapes)]
    node = ir.node("Einsum", inputs, attributes={"equation": equation})
    y = node.outputs[0]
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(inputs, [y], nodes=[node], opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("equation", "perm"),
    [("nhwpqc->nchpwq", [0, 5, 1, 3, 2, 4]), ("ab->ba", [1, 0]), (" a b -> a b ", [0, 1])],
)
def test_permutation_becomes_a_transpose(equation: str, perm: list[int]):
    shape = [2, 3, 4, 5, 6, 7][: len(perm)]
    model = make_einsum(equation, shape)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with OrtRunner(ir.to_proto(model).SerializeToString()) as runner:
        expected = runner.run({"x0": x})
    y = model.graph.outputs[0]
    assert RewriteEinsum()(model).modified
    [node] = model.graph
    assert (node.op_type, list(node.attributes)) == ("Transpose", ["perm"])
    assert node.outputs[0] is y
    assert list(node.attributes["perm"].as_ints()) == perm
    with OrtRunner(ir.to_proto(model).SerializeToString()) as runner:
        np.testing.assert_array_equal(runner.run({"x0": x}), expected)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ij,jk->ik", [[2, 3], [3, 4]]),
        ("ij->i", [[2, 3]]),
        ("ii->i", [[3, 3]]),
        ("...ij->...ji", [[2, 3]]),
        ("ij", [[2, 3]]),
    ],
)
def test_contractions_stay(equation: str, shapes: list[list[int]]):
    model = make_einsum(equation, *shapes)
    assert not RewriteEinsum()(model).modified
    assert [node.op_type for node in model.graph] == ["Einsum"]


def test_unpatchify_of_the_exported_dit(exported_dit: ir.Model):
    model = exported_dit.clone()
    assert [node.op_type for node in model.graph].count("Einsum") == 1
    RewriteEinsum()(model)
    assert not [node for node in model.graph if node.op_type == "Einsum"]
