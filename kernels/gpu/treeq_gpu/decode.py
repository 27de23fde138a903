"""Weight codes from bit planes, in registers.

Weights stay bit planes (`treeq_export.quant.packing`) until they are in registers. A word holds one
bit of 32 neighbouring channels; `(word >> i) & 0x01010101` picks channels i, 8+i, 16+i and 24+i,
one per byte, so four codes cost about two integer instructions per bit. Two things allow that:

- The activation codes are stored in the same order: inside 32 channels, code 4*i + j is channel
  8*j + i. Both operands are permuted alike, so the sums are what they were.
- A code sits at the TOP of its byte: ((u << (8-b)) ^ 0x80) is the signed byte code * 2^(8-b), so no
  sign has to be extended. Whoever reads the sums takes 2^(8-b) out.

The bytes are put in order by `tl.join`, which keeps both of its operands in the thread;
broadcasting over bytes spreads a word over threads, and each decodes it again (README.md counts).
"""

# Kernels are compiled, or rewritten by the interpreter: coverage sees no line of them.
# ruff: noqa: N803  kernel arguments that are sizes have the capital letters of the formulas
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

LOW_BITS = tl.constexpr(0x01010101)
SIGN_BITS = tl.constexpr(-0x7F7F7F80)  # 0x80808080 as int32


@triton.jit
def _four_bytes(word):  # pragma: no cover
    """Return the bytes of `word` (..., ) int32 as (..., 2, 2) int8, byte 2*a + b at [a, b]."""
    even = tl.join(word.to(tl.int8), (word >> 16).to(tl.int8))
    odd = tl.join((word >> 8).to(tl.int8), (word >> 24).to(tl.int8))
    return tl.join(even, odd)


@triton.jit
def _pick(words, i: tl.constexpr, shift: tl.constexpr):  # pragma: no cover
    """Return bit i of each byte of `words`, moved to bit `shift` of that byte."""
    return ((words >> i) & LOW_BITS) << shift


@triton.jit
def _decode_words(
    pointers, stride, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # pragma: no cover
    """Decode with a whole word in one thread: the fewest instructions where words are many."""
    c0 = tl.full((BN, BK // 32), SIGN_BITS, tl.int32)
    c1 = c0
    c2 = c0
    c3 = c0
    c4 = c0
    c5 = c0
    c6 = c0
    c7 = c0
    for p in tl.static_range(BITS):
        words = tl.load(pointers + p * stride)
        c0 ^= _pick(words, 0, 8 - BITS + p)
        c1 ^= _pick(words, 1, 8 - BITS + p)
        c2 ^= _pick(words, 2, 8 - BITS + p)
        c3 ^= _pick(words, 3, 8 - BITS + p)
        c4 ^= _pick(words, 4, 8 - BITS + p)
        c5 ^= _pick(words, 5, 8 - BITS + p)
        c6 ^= _pick(words, 6, 8 - BITS + p)
        c7 ^= _pick(words, 7, 8 - BITS + p)
    b04 = tl.join(_four_bytes(c0), _four_bytes(c4))
    b26 = tl.join(_four_bytes(c2), _four_bytes(c6))
    b15 = tl.join(_four_bytes(c1), _four_bytes(c5))
    b37 = tl.join(_four_bytes(c3), _four_bytes(c7))
    # (BN, BK/32, byte/2, byte%2, i/4, i/2%2, i%2) -> bytes last
    joined = tl.join(tl.join(b04, b26), tl.join(b15, b37))
    return tl.reshape(tl.permute(joined, (0, 1, 4, 5, 6, 2, 3)), (BN, BK))


@triton.jit
def _decode_spread(
    pointers, stride, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # pragma: no cover
    """Decode with a word in up to 8 threads: for tiles that have fewer words than threads."""
    i = tl.arange(0, 8)[None, None, :]
    c = tl.full((BN, BK // 32, 8), SIGN_BITS, tl.int32)
    for p in tl.static_range(BITS):
        words = tl.load(pointers + p * stride)
        c ^= ((words[:, :, None] >> i) & LOW_BITS) << (8 - BITS + p)
    return tl.reshape(_four_bytes(c), (BN, BK))


@triton.jit
def decode(
    planes,
    rows,
    columns,
    N,
    KW,
    BITS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPREAD: tl.constexpr,
):  # pragma: no cover
    """Return weight codes * 2^(8-BITS), (BN, BK) int8, in the interleaved order.

    Args:
        planes: Pointer to (BITS, N, KW) int32, at the first row of the tile.
        rows: (BN,) rows of the tile, those outside clamped.
        columns: (BK / 32,) words below KW.
        N: Output channels.
        KW: Words per row.
        BITS: 2..8.
        BN: Rows of the tile.
        BK: Channels of the tile.
        SPREAD: Several threads share a word.
    """
    pointers = planes + rows[:, None] * KW + columns[None, :]
    stride = N.to(tl.int64) * KW
    if SPREAD:
        return _decode_spread(pointers, stride, BITS, BN, BK)
    return _decode_words(pointers, stride, BITS, BN, BK)
