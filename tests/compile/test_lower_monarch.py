from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from treeq_export.compile.passes.lower_monarch import LowerMonarch
from treeq_export.quant.branch import apply_branch, dense_branch

Make = Callable[..., Any]
GRIDS = [(1, 1, 3), (2, 2, 1), (4, 1, 2), (1, 3, 2), (2, 6, 2)]


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("grid", GRIDS)
def test_equals_the_reference(
    grid: tuple[int, int, int],
    rank: int,
    make_branch: Make,
    make_sum_model: Make,
    run_onnx: Make,
):
    branch = make_branch(*grid)
    model = make_sum_model(None, branch, rank=rank)
    output = model.graph.outputs[0].name
    assert LowerMonarch()(model).modified
    assert [value.name for value in model.graph.outputs] == [output]
    assert all(node.domain == "" for node in model.graph)
    x = np.random.default_rng(0).standard_normal((5, 64) if rank == 2 else (2, 3, 64))
    x = x.astype(np.float32)
    expected = apply_branch(x, branch.R, branch.L)
    received = run_onnx(model, x)
    assert received.shape == expected.shape == (*x.shape[:-1], 12)
    np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        received, x @ dense_branch(branch.R, branch.L).T, rtol=1e-4, atol=1e-4
    )


def test_low_rank_is_two_products(make_branch: Make, make_sum_model: Make):
    branch = make_branch(1, 1, 3)
    model = make_sum_model(None, branch)
    LowerMonarch()(model)
    assert [node.op_type for node in model.graph] == ["MatMul", "MatMul"]
    first, second = model.graph
    assert second.inputs[0] is first.outputs[0]
    names = [first.inputs[1].name, second.inputs[1].name]
    assert names == ["blocks.0.fc.branch.R_matrix", "blocks.0.fc.branch.L_matrix"]
    np.testing.assert_array_equal(first.inputs[1].const_value.numpy(), branch.R[0])
    np.testing.assert_array_equal(second.inputs[1].const_value.numpy(), branch.L[0])
    assert all(node.name.startswith("blocks.0.fc/branch/") for node in model.graph)


def test_model_without_branch_is_left_alone(make_layer: Make, make_model: Make):
    model = make_model(make_layer())
    before = list(model.graph)
    assert not LowerMonarch()(model).modified
    assert list(model.graph) == before
