"""Properties of the choice of kernels."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from treeq_gpu import choose
from treeq_gpu import instantiations as inst
from treeq_gpu.instantiations import INSTANTIATIONS

from tests.hand_layers import make_format
from treeq_export.ops import ACT_SCALES, ActScale, LayerFormat

tokens = st.integers(1, 20_000)
channels = st.integers(1, 30_000)
multiprocessors = st.integers(1, 200)


def linear(n: int, k: int, bits: int = 3, group_size: int = 0) -> LayerFormat:
    return make_format(weight_bits=bits, group_size=group_size, in_features=k, out_features=n)


@given(tokens, channels, st.integers(1, 20_000), st.integers(2, 8), multiprocessors)
def test_product_covers_y_and_all_of_k(m: int, n: int, k: int, bits: int, sms: int):
    launches = choose.choose_qlinear(linear(n, k, bits), m, sms)
    product, splits = launches[0], choose.num_splits(launches)
    constants = product.kernel.constants
    kp = choose.padded(k)
    k_per_split = product.numbers.get("k_per_split", kp)
    assert product.kernel.name in INSTANTIATIONS
    assert product.numbers["KP"] == kp >= k
    assert kp % 128 == 0
    assert product.grid[0] * constants["BM"] * constants["BN"] >= m * n
    assert product.grid[1:] == (splits, 1)
    assert k_per_split % constants["BK"] == 0
    assert (splits - 1) * k_per_split < kp <= splits * k_per_split
    assert splits <= choose.MAX_SPLITS
    assert splits == 1 or product.grid[0] * splits <= sms
    assert len(launches) == 1 + (splits > 1)
    if splits > 1:
        finish = launches[1]
        tile = finish.kernel.constants
        assert finish.kernel.name in INSTANTIATIONS
        assert finish.grid[0] * tile["BM"] >= m
        assert finish.grid[1] * tile["BN"] >= n


@given(tokens, channels, st.integers(1, 200), st.sampled_from(inst.GROUPED_BITS), multiprocessors)
def test_groups_are_whole_steps_and_not_cut(m: int, n: int, words: int, bits: int, sms: int):
    group_size = 32 * words
    (launch,) = choose.choose_qlinear(linear(n, 3 * group_size, bits, group_size), m, sms)
    constants = launch.kernel.constants
    assert launch.kernel.name in INSTANTIATIONS
    assert group_size % constants["BK"] == 0
    assert constants["GROUP_SIZE"] == constants["BK"]
    assert launch.grid[0] * constants["BM"] * constants["BN"] >= m * n


@given(tokens, st.integers(1, 20_000), st.sampled_from(ACT_SCALES), multiprocessors)
def test_quantize_covers_rows_and_columns(m: int, k: int, act_scale: ActScale, sms: int):
    layer = make_format(act_scale=act_scale, rotation_group=1, in_features=k)
    launch = choose.choose_quantize(layer, m, sms)
    columns = launch.numbers["columns_per_program"]
    assert launch.kernel.name in INSTANTIATIONS
    assert launch.grid[0] * launch.kernel.constants["BM"] >= m
    assert columns % launch.kernel.constants["WIDTH"] == 0
    covered = launch.grid[1] * columns
    assert choose.padded(k) <= covered < choose.padded(k) + columns


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
    first, second = choose.choose_monarch(m, block_in, b_in, b_out, rank, block_out, dtype)
    assert {first.kernel.name, second.kernel.name} <= set(INSTANTIATIONS)
    assert first.grid[0] * first.kernel.constants["BM"] >= m
    assert first.grid[1] * first.kernel.constants["BN"] >= b_out * rank
    assert first.grid[2] == b_in
    assert second.grid[0] * second.kernel.constants["BM"] >= m
    assert second.grid[1] * second.kernel.constants["BN"] >= block_out
    assert second.grid[2] == b_out


@given(tokens, channels, st.integers(1, 20_000), st.integers(2, 8), multiprocessors)
def test_workspace_holds_every_part(m: int, n: int, k: int, bits: int, sms: int):
    layer = linear(n, k, bits)
    splits = choose.num_splits(choose.choose_qlinear(layer, m, sms))
    parts = choose.workspace_parts(layer, m, splits)
    assert all(part % 256 == 0 for part in parts)
    assert parts[0] >= m * choose.padded(k)
    assert parts[1] >= 4 * m
    assert parts[2] >= (4 * splits * m * n if splits > 1 else 0)
    assert sum(parts) == choose.workspace_bytes(layer, m, sms)


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
    launches = choose.choose_qlinear(linear(n, k), m, 132)
    assert (launches[0].kernel.name, choose.num_splits(launches)) == expected


def test_names_are_c_identifiers_and_few():
    assert all(name.isidentifier() and name.isascii() for name in INSTANTIATIONS)
    assert len({(i.kernel, i.dtype, *i.constants.items()) for i in INSTANTIATIONS.values()}) == len(
        INSTANTIATIONS
    )
