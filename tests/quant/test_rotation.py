import numpy as np
import pytest

from treeq_export.quant.rotation import hadamard, rotate

GROUPS = [1, 2, 4, 8, 16, 32, 64, 128, 256]


@pytest.mark.parametrize("group", GROUPS)
def test_hadamard_is_symmetric_orthonormal_and_flat(group: int):
    matrix = hadamard(group)
    assert matrix.shape == (group, group)
    assert matrix.dtype == np.float64
    assert np.array_equal(matrix, matrix.T)
    np.testing.assert_allclose(matrix @ matrix, np.eye(group), atol=1e-12)
    assert set(np.abs(matrix).ravel().tolist()) == {1 / np.sqrt(group)}


@pytest.mark.parametrize("group", GROUPS)
def test_hadamard_is_sylvesters(group: int):
    i, j = np.indices((group, group))
    ones = np.bitwise_count(i & j).astype(int)
    assert np.array_equal(np.sign(hadamard(group)), (-1.0) ** ones)


def test_hadamard_is_read_only_because_it_is_cached():
    assert hadamard(8) is hadamard(8)
    with pytest.raises(ValueError, match="read-only"):
        hadamard(8)[0, 0] = 2.0


def test_group_one_returns_x_itself():
    x = np.arange(6.0).reshape(2, 3)
    assert rotate(x, 1) is x


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 64)])
def test_shape_and_dtype_are_kept(dtype: type[np.floating], shape: tuple[int, ...]):
    x = np.ones(shape, dtype=dtype)
    rotated = rotate(x, 16)
    assert rotated.shape == shape
    assert rotated.dtype == dtype
    assert np.array_equal(x, np.ones(shape, dtype=dtype))


@pytest.mark.parametrize("group", GROUPS)
def test_rotation_is_its_own_inverse_and_keeps_the_norm(group: int):
    x = np.random.default_rng(group).standard_normal((3, 512))
    rotated = rotate(x, group)
    np.testing.assert_allclose(rotate(rotated, group), x, atol=1e-12)
    np.testing.assert_allclose(
        np.linalg.norm(rotated, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-12
    )


@pytest.mark.parametrize("group", GROUPS)
def test_rotating_both_sides_keeps_the_product(group: int):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((7, 256)), rng.standard_normal((5, 256))
    np.testing.assert_allclose(rotate(x, group) @ rotate(weight, group).T, x @ weight.T, atol=1e-11)


def test_groups_do_not_mix():
    x = np.zeros((1, 12))
    x[0, 5] = 2.0
    assert rotate(x, 4).tolist() == [[0, 0, 0, 0, 1, -1, 1, -1, 0, 0, 0, 0]]
