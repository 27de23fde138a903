"""The Monarch branch against dense algebra."""

import numpy as np
import pytest

from treeq_export.quant.branch import apply_branch, dense_branch, fit_branch
from treeq_export.quant.spec import BranchFormat

SHAPES = [(1, 1, 4), (2, 1, 3), (1, 3, 2), (4, 2, 3), (3, 4, 5)]
N, K = 24, 36


def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((N, K))


def branch_of(shape: tuple[int, int, int]) -> BranchFormat:
    return BranchFormat(b_in=shape[0], b_out=shape[1], rank=shape[2])


def truncated_svd(block: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(block)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_block_is_its_truncated_svd(shape: tuple[int, int, int]):
    b_in, b_out, rank = shape
    w = weight()
    dense = dense_branch(*fit_branch(w, branch_of(shape)))
    assert dense.shape == (N, K)
    height, width = N // b_out, K // b_in
    for i in range(b_out):
        for j in range(b_in):
            rows = slice(i * height, (i + 1) * height)
            columns = slice(j * width, (j + 1) * width)
            expected = truncated_svd(w[rows, columns], rank)
            np.testing.assert_allclose(dense[rows, columns], expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_factor_shapes_and_parameter_count(shape: tuple[int, int, int]):
    b_in, b_out, rank = shape
    branch = branch_of(shape)
    r_factor, l_factor = fit_branch(weight(), branch)
    assert r_factor.shape == (b_in, K // b_in, b_out * rank)
    assert l_factor.shape == (b_out, b_in * rank, N // b_out)
    assert (r_factor.dtype, l_factor.dtype) == (np.float32, np.float32)
    assert r_factor.flags.c_contiguous
    assert l_factor.flags.c_contiguous
    assert branch.num_parameters(K, N) == r_factor.size + l_factor.size
    assert branch.num_parameters(K, N) == rank * (N * b_in + K * b_out)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("leading", [(), (7,), (2, 3)])
def test_apply_is_the_dense_product(shape: tuple[int, int, int], leading: tuple[int, ...]):
    b_in, b_out, rank = shape
    rng = np.random.default_rng(1)
    r_factor = rng.standard_normal((b_in, K // b_in, b_out * rank))
    l_factor = rng.standard_normal((b_out, b_in * rank, N // b_out))
    x = rng.standard_normal((*leading, K))
    y = apply_branch(x, r_factor, l_factor)
    assert y.shape == (*leading, N)
    np.testing.assert_allclose(y, x @ dense_branch(r_factor, l_factor).T, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_apply_is_the_formula_by_loops(shape: tuple[int, int, int]):
    b_in, b_out, rank = shape
    rng = np.random.default_rng(2)
    r_factor = rng.standard_normal((b_in, K // b_in, b_out * rank))
    l_factor = rng.standard_normal((b_out, b_in * rank, N // b_out))
    x = rng.standard_normal(K)
    y = np.zeros((b_out, N // b_out))
    for i in range(b_out):
        for j in range(b_in):
            part = x[j * (K // b_in) : (j + 1) * (K // b_in)]
            for q in range(rank):
                z = part @ r_factor[j, :, i * rank + q]
                y[i] += z * l_factor[i, j * rank + q]
    np.testing.assert_allclose(apply_branch(x, r_factor, l_factor), y.ravel(), atol=1e-11)


def test_one_block_is_plain_low_rank():
    r_factor, l_factor = fit_branch(weight(), branch_of((1, 1, 5)))
    low_rank = l_factor[0].T @ r_factor[0].T
    np.testing.assert_allclose(dense_branch(r_factor, l_factor), low_rank, atol=1e-5)
    np.testing.assert_allclose(low_rank, truncated_svd(weight(), 5), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 2, 12), (4, 3, 8), (36, 24, 1)])
def test_full_rank_recovers_the_weight(shape: tuple[int, int, int]):
    dense = dense_branch(*fit_branch(weight(), branch_of(shape)))
    np.testing.assert_allclose(dense, weight(), atol=2e-6)


def test_singular_values_are_shared_evenly():
    r_factor, l_factor = fit_branch(weight(), branch_of((1, 1, 3)))
    _, s, _ = np.linalg.svd(weight())
    np.testing.assert_allclose(np.linalg.norm(r_factor[0], axis=0), np.sqrt(s[:3]), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(l_factor[0], axis=1), np.sqrt(s[:3]), rtol=1e-5)


def test_finer_blocks_are_better_at_equal_rank():
    errors = [
        np.linalg.norm(weight() - dense_branch(*fit_branch(weight(), branch_of(shape))))
        for shape in [(1, 1, 2), (2, 1, 2), (2, 2, 2), (4, 4, 2)]
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]
