"""The integer product of `treeq::QLinear` on the tensor cores, from packed weights.

    acc  = q_x q_w^T                                  int8 x int8 -> int32, exact
    y    = (acc * s_w) * s_x + bias + addend          fp32, rounded once to the type of y

Three kernels: `qlinear_kernel` does all of it, `qlinear_partials_kernel` a slice of K where the
tiles of y alone would not fill the GPU, and `finish_kernel` adds those slices in a fixed order, so
results do not depend on timing. `quantize_tokens.py` writes the codes and their scales, `decode.py`
says in which order, and why the sums here carry a factor 2^(8-b): the scale of the weights takes it
out, or a shift where sums are stored, both exactly.
"""

# Kernels are compiled, or rewritten by the interpreter: coverage sees no line of them.
# pyright: reportPossiblyUnboundVariable=false
# ruff: noqa: N803  kernel arguments that are sizes have the capital letters of the formulas

import triton
import triton.language as tl

from treeq_gpu.decode import decode


@triton.jit
def _tile_of(pid, M, N, BM: tl.constexpr, BN: tl.constexpr):  # pragma: no cover
    """Return the first row and column of a tile; 8 row tiles share their weights in L2."""
    num_m = (M + BM - 1) // BM
    num_n = (N + BN - 1) // BN
    per_band = 8 * num_n
    first = pid // per_band * 8
    height = tl.minimum(num_m - first, 8)
    inside = pid % per_band
    return (first + inside % height) * BM, (inside // height) * BN


@triton.jit
def _clamped(first, size, BLOCK: tl.constexpr):  # pragma: no cover
    """Return (BLOCK,) offsets from `first`; those past `size` read the last and are not stored."""
    return tl.minimum(tl.arange(0, BLOCK), size - 1 - first)


@triton.jit
def _code_pointers(codes, first_m, M, KP, BM: tl.constexpr, BK: tl.constexpr):  # pragma: no cover
    """Return pointers (BM, BK) to the first codes of a tile's rows."""
    rows = _clamped(first_m, M, BM)
    return codes + first_m.to(tl.int64) * KP + rows[:, None] * KP + tl.arange(0, BK)[None, :]


@triton.jit
def _sums(
    codes,
    planes,
    first_m,
    first_n,
    k_begin,
    k_end,
    M,
    N,
    KP,
    KW,
    BITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPREAD: tl.constexpr,
):  # pragma: no cover
    """Return the int32 sums (BM, BN) of channels k_begin..k_end of K, times 2^(8-BITS)."""
    acc = tl.full((BM, BN), 0, tl.int32)
    a_pointers = _code_pointers(codes, first_m, M, KP, BM, BK)
    channels = _clamped(first_n, N, BN)
    planes += first_n.to(tl.int64) * KW
    for k in range(k_begin, k_end, BK):
        a = tl.load(a_pointers + k)
        # The codes past K are zero: what the clamped words hold there does not matter.
        columns = tl.minimum(k // 32 + tl.arange(0, BK // 32), KW - 1)
        b = decode(planes, channels, columns, N, KW, BITS, BN, BK, SPREAD)
        acc = tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _store_rows(
    y,
    value,
    act_scale,
    bias,
    addend,
    first_m,
    first_n,
    M,
    N,
    row_stride,
    has_bias,
    has_addend,
    BM: tl.constexpr,
    BN: tl.constexpr,
):  # pragma: no cover
    """Store a tile of y whose rows are `row_stride`, N, apart.

    The tile's address is a 64-bit scalar and offsets in the tile are 32 bits wide: 64-bit offsets
    of 64 elements would take all registers of a thread.
    """
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    base = first_m.to(tl.int64) * row_stride + first_n
    offset = m[:, None] * row_stride + n[None, :]
    inside = (m < M - first_m)[:, None] & (n < N - first_n)[None, :]
    value *= tl.load(act_scale + first_m + m, mask=m < M - first_m, other=0.0)[:, None]
    some = n < (N - first_n) * has_bias
    value += tl.load(bias + first_n + n, mask=some, other=0.0)[None, :]
    some = inside & (m < (M - first_m) * has_addend)[:, None]
    value += tl.load(addend + base + offset, mask=some, other=0.0).to(tl.float32)
    tl.store(y + base + offset, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _store(
    y,
    value,
    act_scale,
    bias,
    addend,
    first_m,
    first_n,
    M,
    N,
    has_bias,
    has_addend,
    BM: tl.constexpr,
    BN: tl.constexpr,
):  # pragma: no cover
    """Store value * s_x + bias + addend, rounded once to the type of y.

    The compiler stores 16 bytes at once where it sees that N is a multiple of 8.
    """
    if N % 8 == 0:
        _store_rows(
            *(y, value, act_scale, bias, addend, first_m, first_n),
            *(M, N // 8 * 8, N // 8 * 8, has_bias, has_addend, BM, BN),
        )
    else:
        _store_rows(
            *(y, value, act_scale, bias, addend, first_m, first_n),
            *(M, N, N, has_bias, has_addend, BM, BN),
        )


@triton.jit
def _store_sums_rows(
    out, acc, first_m, first_n, M, N, row_stride, BM: tl.constexpr, BN: tl.constexpr
):  # pragma: no cover
    """Store int32 sums of a tile at out[m * row_stride + n]."""
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    inside = (m < M - first_m)[:, None] & (n < N - first_n)[None, :]
    out += first_m.to(tl.int64) * row_stride + first_n
    tl.store(out + m[:, None] * row_stride + n[None, :], acc, mask=inside)


@triton.jit
def _store_sums(
    out, acc, first_m, first_n, M, N, steps, BM: tl.constexpr, BN: tl.constexpr
):  # pragma: no cover
    """Store int32 sums of a tile whose rows are steps * N apart; 16 bytes at once for N % 4 = 0."""
    if N % 4 == 0:
        N = N // 4 * 4  # noqa: N806
        _store_sums_rows(out, acc, first_m, first_n, M, N, steps * N, BM, BN)
    else:
        _store_sums_rows(out, acc, first_m, first_n, M, N, steps * N, BM, BN)


@triton.jit(do_not_specialize=["M", "N", "KW", "num_groups", "has_bias", "has_addend"])
def qlinear_kernel(
    codes,
    planes,
    act_scale,
    weight_scale,
    bias,
    addend,
    y,
    M,
    N,
    KP,
    KW,
    num_groups,
    has_bias,
    has_addend,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPREAD: tl.constexpr,
    SUMS: tl.constexpr,
):  # pragma: no cover
    """Compute one (BM, BN) tile of y.

    Args:
        codes: (M, KP) int8, interleaved; zeros from K to KP.
        planes: (BITS, N, KW) int32.
        act_scale: (M,) float32.
        weight_scale: (N, num_groups) float32.
        bias: (N,) float32, read where has_bias is not 0.
        addend: (M, N) of the type of y, read where has_addend is not 0.
        y: (M, N) fp16, bf16 or fp32; with SUMS int32, (M, N) or (M, KW*32/BK, N).
        M: Tokens.
        N: Output channels.
        KP: K padded to a multiple of 128.
        KW: Words per row of a plane, ceil(K / 32).
        num_groups: Scales per output channel; 1 where GROUP_SIZE is 0.
        has_bias: 0 or 1.
        has_addend: 0 or 1.
        BITS: Bits of a weight.
        GROUP_SIZE: 0, or BK: scales are per group of some multiple of BK channels.
        BM: Tokens of a tile.
        BN: Output channels of a tile.
        BK: Channels of a step.
        SPREAD: Several threads decode one word.
        SUMS: Store the int32 sums instead of y, for tests: of all K, or of each step where grouped.
    """
    first_m, first_n = _tile_of(tl.program_id(0), M, N, BM, BN)
    unit: tl.constexpr = 2.0 ** (BITS - 8)  # of the sums; a power of two, so the product is exact
    if GROUP_SIZE == 0:
        acc = _sums(
            *(codes, planes, first_m, first_n, 0, KP, M, N, KP, KW),
            *(BITS, BM, BN, BK, SPREAD),
        )
        if SUMS:
            _store_sums(y, acc >> (8 - BITS), first_m, first_n, M, N, 1, BM, BN)
        else:
            n = _clamped(first_n, N, BN)
            s_w = tl.load(weight_scale + first_n + n) * unit
            value = acc.to(tl.float32) * s_w[None, :]
    else:
        value = tl.full((BM, BN), 0, tl.float32)
        num_steps = KW * 32 // BK
        steps_per_group = num_steps // num_groups
        steps_left = steps_per_group
        a_pointers = _code_pointers(codes, first_m, M, KP, BM, BK)
        planes += first_n.to(tl.int64) * KW
        n = _clamped(first_n, N, BN)
        scale_pointers = weight_scale + first_n.to(tl.int64) * num_groups + n * num_groups
        for step in range(num_steps):
            a = tl.load(a_pointers + step * BK)
            columns = step * (BK // 32) + tl.arange(0, BK // 32)
            b = decode(planes, n, columns, N, KW, BITS, BN, BK, SPREAD)
            acc = tl.dot(a, tl.trans(b), out_dtype=tl.int32)
            if SUMS:
                out = y + step * N
                _store_sums(out, acc >> (8 - BITS), first_m, first_n, M, N, num_steps, BM, BN)
            else:
                s_w = tl.load(scale_pointers)
                value += acc.to(tl.float32) * s_w[None, :]
                steps_left -= 1
                last = steps_left == 0
                scale_pointers += tl.where(last, 1, 0)
                steps_left = tl.where(last, steps_per_group, steps_left)
        value *= unit
    if not SUMS:
        _store(
            *(y, value, act_scale, bias, addend, first_m, first_n),
            *(M, N, has_bias, has_addend, BM, BN),
        )


@triton.jit(do_not_specialize=["M", "N", "KW"])
def qlinear_partials_kernel(
    codes,
    planes,
    partials,
    M,
    N,
    KP,
    KW,
    k_per_split,
    BITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPREAD: tl.constexpr,
):  # pragma: no cover
    """Store the int32 sums of one slice of K: partials (S, M, N), slice = program_id(1).

    Args:
        codes: Same as `codes` of `qlinear_kernel`.
        planes: Same as `planes` of `qlinear_kernel`.
        partials: (S, M, N) int32.
        M: Tokens.
        N: Output channels.
        KP: K padded to a multiple of 128.
        KW: Words per row of a plane.
        k_per_split: Channels of a slice, a multiple of BK; S * k_per_split >= KP.
        BITS: Bits of a weight.
        BM: Tokens of a tile.
        BN: Output channels of a tile.
        BK: Channels of a step.
        SPREAD: Several threads decode one word.
    """
    first_m, first_n = _tile_of(tl.program_id(0), M, N, BM, BN)
    split = tl.program_id(1)
    k_begin = split * k_per_split
    k_end = tl.minimum(k_begin + k_per_split, KP)
    acc = _sums(
        *(codes, planes, first_m, first_n, k_begin, k_end, M, N, KP, KW),
        *(BITS, BM, BN, BK, SPREAD),
    )
    partials += split.to(tl.int64) * M * N
    _store_sums(partials, acc >> (8 - BITS), first_m, first_n, M, N, 1, BM, BN)


@triton.jit(do_not_specialize=["M", "N", "num_splits", "has_bias", "has_addend"])
def finish_kernel(
    partials,
    act_scale,
    weight_scale,
    bias,
    addend,
    y,
    M,
    N,
    num_splits,
    has_bias,
    has_addend,
    BM: tl.constexpr,
    BN: tl.constexpr,
):  # pragma: no cover
    """Add the slices of K and finish y, one (BM, BN) tile per program (row tile, column tile).

    Args:
        partials: (num_splits, M, N) int32.
        act_scale: (M,) float32.
        weight_scale: (N, 1) float32.
        bias: (N,) float32, read where has_bias is not 0.
        addend: (M, N) of the type of y, read where has_addend is not 0.
        y: (M, N) fp16, bf16 or fp32.
        M: Tokens.
        N: Output channels.
        num_splits: Slices, S.
        has_bias: 0 or 1.
        has_addend: 0 or 1.
        BM: Tokens of a tile.
        BN: Output channels of a tile.
    """
    first_m = tl.program_id(0) * BM
    first_n = tl.program_id(1) * BN
    m = _clamped(first_m, M, BM)
    n = _clamped(first_n, N, BN)
    acc = tl.full((BM, BN), 0, tl.int32)
    partials += first_m.to(tl.int64) * N + first_n
    for _ in range(num_splits):
        acc += tl.load(partials + m[:, None] * N + n[None, :])
        partials += M.to(tl.int64) * N
    value = acc.to(tl.float32) * tl.load(weight_scale + first_n + n)[None, :]
    _store(y, value, act_scale, bias, addend, first_m, first_n, M, N, has_bias, has_addend, BM, BN)
