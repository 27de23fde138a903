"""Properties of the choice of kernels."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from treeq_gpu import choose
from treeq_gpu import instantiations as inst
from treeq_gpu.instantiations import INSTANTIATIONS

from treeq_export.ops import ACT_SCALES, ActScale

tokens = st.integers(1, 20_000)
channels = st.integers(1, 30_000)
multiprocessors = st.integers(1, 200)


@given(tokens, channels, st.integers(1, 20_000), st.integers(2, 8), multiprocessors)
def test_product_covers_y_and_all_of_k(m: int, n: int, k: int, bits: int, sms: int):
    launch = choose.choose_qlinear(m, n, k, bits, 0, sms)
    constants = INSTANTIATIONS[launch.instantiation].constants
    kp = choose.padded(k)
    assert kp >= k
    assert kp % 128 == 0
    assert launch.grid[0] * constants["BM"] * constants["BN"] >= m * n
    assert launch.grid[1:] == (launch.split_k, 1)
    assert launch.k_per_split % constants["BK"] == 0
    assert (launch.split_k - 1) * launch.k_per_split < kp <= launch.split_k * launch.k_per_split
    assert launch.split_k <= choose.MAX_SPLITS
    assert launch.split_k == 1 or launch.grid[0] * launch.split_k <= sms
    assert (launch.finish is None) == (launch.finish_grid is None) == (launch.split_k == 1)
    if launch.finish is not None and launch.finish_grid is not None:
        tile = INSTANTIATIONS[launch.finish].constants
        assert launch.finish_grid[0] * tile["BM"] >= m
        assert launch.finish_grid[1] * tile["BN"] >= n


@given(tokens, channels, st.integers(1, 200), st.sampled_from(inst.GROUPED_BITS), multiprocessors)
def test_groups_are_whole_steps_and_not_cut(m: int, n: int, words: int, bits: int, sms: int):
    group_size = 32 * words
    launch = choose.choose_qlinear(m, n, 3 * group_size, bits, group_size, sms)
    constants = INSTANTIATIONS[launch.instantiation].constants
    assert group_size % constants["BK"] == 0
    assert constants["GROUP_SIZE"] == constants["BK"]
    assert launch.split_k == 1
    assert launch.grid[0] * constants["BM"] * constants["BN"] >= m * n


@given(tokens, st.integers(1, 20_000), st.sampled_from(ACT_SCALES), multiprocessors)
def test_quantize_covers_rows_and_columns(m: int, k: int, act_scale: ActScale, sms: int):
    launch = choose.choose_quantize(m, k, act_scale, 1, sms)
    constants = INSTANTIATIONS[launch.instantiation].constants
    assert launch.grid[0] * constants["BM"] >= m
    assert launch.columns_per_program % constants["WIDTH"] == 0
    covered = launch.grid[1] * launch.columns_per_program
    assert choose.padded(k) <= covered < choose.padded(k) + launch.columns_per_program


@given(tokens, *[st.integers(1, 300)] * 5, st.sampled_from(inst.DTYPES))
def test_monarch_covers_both_products(
    m: int,
    block_in: int,
    b_in: int,
    b_out: int,
    rank: int,
    block_out: int,
    dtype: inst.DType,
):
    launch = choose.choose_monarch(m, block_in, b_in, b_out, rank, block_out, dtype)
    first = INSTANTIATIONS[launch.instantiation_in].constants
    second = INSTANTIATIONS[launch.instantiation_out].constants
    assert launch.grid_in[0] * first["BM"] >= m
    assert launch.grid_in[1] * first["BN"] >= b_out * rank
    assert launch.grid_in[2] == b_in
    assert launch.grid_out[0] * second["BM"] >= m
    assert launch.grid_out[1] * second["BN"] >= block_out
    assert launch.grid_out[2] == b_out


@given(tokens, channels, st.integers(1, 20_000), st.integers(2, 8), multiprocessors)
def test_workspace_holds_every_part(m: int, n: int, k: int, bits: int, sms: int):
    launch = choose.choose_qlinear(m, n, k, bits, 0, sms)
    parts = choose.workspace_parts(m, n, k, launch.split_k)
    assert all(part % 256 == 0 for part in parts)
    assert parts[0] >= m * choose.padded(k)
    assert parts[1] >= 4 * m
    assert parts[2] >= (4 * launch.split_k * m * n if launch.split_k > 1 else 0)
    assert sum(parts) == choose.workspace_bytes(m, n, k, bits, 0, sms)


@pytest.mark.parametrize(
    ("m", "n", "k", "expected"),
    [
        (1, 1152, 1152, ("qlinear_partials_w3_token", 5)),
        (16, 6912, 1152, ("qlinear_w3_token_fp16", 1)),
        (256, 1152, 4608, ("qlinear_w3_small_fp16", 1)),
        (64, 1152, 4608, ("qlinear_partials_w3_small", 6)),
        (2048, 4608, 1152, ("qlinear_w3_wide_fp16", 1)),
    ],
)
def test_shapes_of_dit_xl_on_132_multiprocessors(m: int, n: int, k: int, expected: tuple[str, int]):
    launch = choose.choose_qlinear(m, n, k, 3, 0, 132)
    assert (launch.instantiation, launch.split_k) == expected


def test_names_are_c_identifiers_and_few():
    assert all(name.isidentifier() and name.isascii() for name in INSTANTIATIONS)
    assert len({(i.kernel, i.dtype, *i.constants.items()) for i in INSTANTIATIONS.values()}) == len(
        INSTANTIATIONS
    )
