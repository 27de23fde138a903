"""The packed layout, bit by bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from treeq_export.errors import FormatError
from treeq_export.quant.packing import pack, unpack

ALL_BITS = st.integers(1, 8)


def random_codes(bits: int, n: int, k: int) -> np.ndarray:
    half = 1 << (bits - 1)
    return np.random.default_rng(bits).integers(-half, half, (n, k)).astype(np.int8)


@settings(deadline=None)
@given(bits=ALL_BITS, n=st.integers(1, 4), k=st.integers(1, 100), data=st.data())
def test_roundtrip(bits: int, n: int, k: int, data: st.DataObject):
    half = 1 << (bits - 1)
    codes = data.draw(hnp.arrays(np.int8, (n, k), elements=st.integers(-half, half - 1)))
    planes = pack(codes, bits)
    assert planes.dtype == np.int32
    assert planes.shape == (bits, n, -(-k // 32))
    back = unpack(planes, k)
    assert back.dtype == np.int8
    assert np.array_equal(back, codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("k", [1, 31, 32, 33, 64, 75])
def test_layout_bit_by_bit(bits: int, k: int):
    codes = random_codes(bits, 3, k)
    planes = pack(codes, bits)
    words = -(-k // 32)
    for p in range(bits):
        for row in range(3):
            for position in range(words * 32):
                found = (int(planes[p, row, position // 32]) & 0xFFFFFFFF) >> (position % 32) & 1
                unsigned = int(codes[row, position]) + 2 ** (bits - 1) if position < k else 0
                assert found == unsigned >> p & 1


def test_golden_bytes():
    codes = np.array([[-4, -3, -2, -1, 0, 1, 2, 3] * 5, [3] * 40], dtype=np.int8)
    assert pack(codes, 3).astype("<i4").tobytes().hex(" ", 4) == (
        "aaaaaaaa aa000000 ffffffff ff000000 "  # plane 0, two words a row
        "cccccccc cc000000 ffffffff ff000000 "
        "f0f0f0f0 f0000000 ffffffff ff000000"
    )


@pytest.mark.parametrize("bits", range(2, 9))
def test_dropping_the_lowest_plane_halves_the_codes(bits: int):
    codes = random_codes(bits, 4, 50)
    assert np.array_equal(unpack(pack(codes, bits)[1:], 50), np.floor(codes / 2).astype(np.int8))


def test_unpack_reads_big_endian_words():
    codes = random_codes(5, 2, 40)
    assert np.array_equal(unpack(pack(codes, 5).astype(">i4"), 40), codes)


def test_pack_takes_any_memory_order():
    codes = random_codes(4, 6, 34)
    assert np.array_equal(pack(np.asfortranarray(codes), 4), pack(codes, 4))
    planes = np.asfortranarray(pack(codes, 4))
    assert np.array_equal(unpack(planes, 34), codes)


def test_no_rows():
    planes = pack(np.zeros((0, 40), dtype=np.int8), 4)
    assert planes.shape == (4, 0, 2)
    assert unpack(planes, 40).shape == (0, 40)


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        ([[-5, 0]], 3, "codes in [-5, 0] do not fit 3 bits ([-4, 3]). Quantize to 3 bits first."),
        ([[0, 4]], 3, "codes in [0, 4] do not fit 3 bits ([-4, 3]). Quantize to 3 bits first."),
        ([[1]], 1, "codes in [1, 1] do not fit 1 bits ([-1, 0]). Quantize to 1 bits first."),
        ([[0]], 0, "bits 0 cannot be packed. Use 1..8."),
        ([[0]], 9, "bits 9 cannot be packed. Use 1..8."),
    ],
)
def test_codes_out_of_range_are_refused(codes: list[list[int]], bits: int, message: str):
    with pytest.raises(FormatError) as error:
        pack(np.array(codes, dtype=np.int8), bits)
    assert str(error.value) == message


@pytest.mark.parametrize("in_features", [32, 65])
def test_wrong_number_of_words_is_refused(in_features: int):
    planes = pack(np.zeros((2, 40), dtype=np.int8), 4)
    expected = -(-in_features // 32)
    with pytest.raises(FormatError) as error:
        unpack(planes, in_features)
    assert str(error.value) == (
        f"planes hold 2 words per row, expected {expected} for in_features {in_features}. "
        "Pack the codes of this layer."
    )


@pytest.mark.parametrize("bits", [0, 9])
def test_wrong_number_of_planes_is_refused(bits: int):
    with pytest.raises(FormatError, match=f"bits {bits} cannot be packed"):
        unpack(np.zeros((bits, 2, 1), dtype=np.int32), 32)
