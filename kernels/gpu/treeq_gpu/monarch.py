"""The General Monarch Branch: two batched products around a transpose that only an address sees.

    z = x.reshape(b_in, K/b_in) @ R             (M, b_in, b_out*r), stored as (M, b_out, b_in*r)
    y = z @ L                                   (M, b_out, N/b_out) = (M, N)

fp32 accumulation; z has the type of x. fp32 operands are split in three tf32 products, which keeps
fp32's precision on tensor cores. Ranks are small and free, so every edge is masked.
"""

# Kernels are compiled, or rewritten by the interpreter: coverage sees no line of them.
# ruff: noqa: N803  kernel arguments that are sizes have the capital letters of the formulas

import triton
import triton.language as tl


@triton.jit
def _product(
    a,
    b,
    M,
    num_blocks,
    depth,
    width,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):  # pragma: no cover
    """Return a tile of one block of a (M, num_blocks, depth) @ b (num_blocks, depth, width).

    The block is program_id(2). Both halves of the branch are this product, stored in other places.
    """
    block = tl.program_id(2)
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    a_rows = a + block * depth + rows[:, None] * (num_blocks * depth)
    b_columns = b + block.to(tl.int64) * depth * width + columns[None, :]
    acc = tl.full((BM, BN), 0.0, tl.float32)
    for k in range(0, depth, BK):
        ks = k + tl.arange(0, BK)
        inside = (rows < M)[:, None] & (ks < depth)[None, :]
        left = tl.load(a_rows + ks[None, :], mask=inside, other=0.0)
        inside = (ks < depth)[:, None] & (columns < width)[None, :]
        right = tl.load(b_columns + ks[:, None] * width, mask=inside, other=0.0)
        acc = tl.dot(left, right, acc, input_precision="tf32x3")
    return acc


@triton.jit
def _aligned_product(
    a,
    b,
    M,
    num_blocks,
    depth,
    width,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):  # pragma: no cover
    """Return `_product`; the compiler loads 16 bytes at once where it sees multiples of 8."""
    if (depth % 8 == 0) & (width % 8 == 0):
        acc = _product(a, b, M, num_blocks, depth // 8 * 8, width // 8 * 8, BM, BN, BK)
    else:
        acc = _product(a, b, M, num_blocks, depth, width, BM, BN, BK)
    return acc


@triton.jit
def _store(
    y, value, base, M, width, row_stride, BM: tl.constexpr, BN: tl.constexpr
):  # pragma: no cover
    """Store a tile at columns base.. of rows that are row_stride apart, in the type of y."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (rows < M)[:, None] & (columns < width)[None, :]
    offset = rows[:, None] * row_stride + (base + columns)[None, :]
    tl.store(y + offset, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "block_in", "b_in", "b_out", "rank"])
def monarch_in_kernel(
    x,
    R,
    z,
    M,
    block_in,
    b_in,
    b_out,
    rank,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):  # pragma: no cover
    """Compute z for one block of input channels, program_id(2); tiles of (M, b_out * rank).

    Args:
        x: (M, b_in * block_in) fp16, bf16 or fp32.
        R: (b_in, block_in, b_out * rank), type of x.
        z: (M, b_out, b_in * rank), type of x.
        M: Tokens.
        block_in: Channels of a block.
        b_in: Blocks along the input.
        b_out: Blocks along the output.
        rank: Rank of a block.
        BM: Tokens of a tile.
        BN: Columns of a tile.
        BK: Channels of a step.
    """
    acc = _aligned_product(x, R, M, b_in, block_in, b_out * rank, BM, BN, BK)
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    place = columns // rank * (b_in * rank) + tl.program_id(2) * rank + columns % rank
    inside = (rows < M)[:, None] & (columns < b_out * rank)[None, :]
    offset = rows[:, None] * (b_out * b_in * rank) + place[None, :]
    tl.store(z + offset, acc.to(z.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "inner", "block_out", "b_out"])
def monarch_out_kernel(
    z,
    L,
    y,
    M,
    inner,
    block_out,
    b_out,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):  # pragma: no cover
    """Compute y for one block of output channels, program_id(2); tiles of (M, block_out).

    Args:
        z: (M, b_out, inner) fp16, bf16 or fp32.
        L: (b_out, inner, block_out), type of z.
        y: (M, b_out * block_out), type of z.
        M: Tokens.
        inner: b_in * rank.
        block_out: Output channels of a block.
        b_out: Blocks along the output.
        BM: Tokens of a tile.
        BN: Output channels of a tile.
        BK: Rows of L of a step.
    """
    acc = _aligned_product(z, L, M, b_out, inner, block_out, BM, BN, BK)
    block = tl.program_id(2)
    if block_out % 8 == 0:
        block_out = block_out // 8 * 8
        _store(y, acc, block * block_out, M, block_out, b_out * block_out, BM, BN)
    else:
        _store(y, acc, block * block_out, M, block_out, b_out * block_out, BM, BN)
