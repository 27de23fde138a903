"""Activations to codes: rotation, scale per token, rounding and column order, in one launch.

    x'   = x H_g
    s_x  = max(step * rms(x') | step * max|x'| | step, 1e-20)      KIND 1 | 2 | 3
    q_x  = clip(rint(x' * (1 / s_x)))                              half to even; 0 where NaN

The rotation is a product with a matrix of +-1 made in registers, then a factor 1/sqrt(g) in fp32:
products with +-1 are exact in any type of the tensor cores. Its columns are permuted as `decode.py`
wants the codes, so the permutation is free and stores are contiguous.

rms is taken of x: an orthonormal rotation keeps the sum of squares. max|x'| needs x', so that kind
rotates twice; its second read comes from the cache.
"""

# Kernels are compiled, or rewritten by the interpreter: coverage sees no line of them.
# ruff: noqa: N803  kernel arguments that are sizes have the capital letters of the formulas

import triton
import triton.language as tl

from treeq_export.ops import ActScale

SCALE_FLOOR = tl.constexpr(1e-20)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no fraction bits, half to even
STATIC = tl.constexpr(ActScale.TENSOR_STATIC.number)
TOKEN_RMS = tl.constexpr(ActScale.TOKEN_RMS.number)
TOKEN_ABSMAX = tl.constexpr(ActScale.TOKEN_ABSMAX.number)


@triton.jit
def _channel_of(column):  # pragma: no cover
    """Return the channel that column 4*i + j of the codes holds: 8*j + i, in each 32."""
    return column // 32 * 32 + column % 4 * 8 + column % 32 // 4


@triton.jit
def _hadamard(GROUP: tl.constexpr, WIDTH: tl.constexpr):  # pragma: no cover
    """Return (WIDTH, WIDTH) float32: blocks of +-1 of order GROUP, columns permuted, else 0."""
    k = tl.arange(0, WIDTH)[:, None]
    n = _channel_of(tl.arange(0, WIDTH))[None, :]
    parity = (k % GROUP) & (n % GROUP)  # the sign is that of the number of common bits
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return tl.where(k // GROUP == n // GROUP, 1.0 - 2.0 * (parity & 1), 0.0)


@triton.jit
def _product(x, h):  # pragma: no cover
    """Return x @ h in fp32, h of 0 and +-1.

    fp32 is cut into three bf16 parts, exactly: three products that lose nothing, where tf32 would
    need as many and twice the registers for h. The parts after inf and NaN are 0.
    """
    if x.dtype == tl.float32:
        h = h.to(tl.bfloat16)
        high = x.to(tl.bfloat16)
        rest = tl.where(tl.abs(x) < float("inf"), x - high.to(tl.float32), 0.0)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        y = tl.dot(middle, h, tl.dot(low, h))
        y = tl.dot(high, h, y)
    else:
        y = tl.dot(x, h.to(x.dtype))
    return y


@triton.jit
def _rotate(
    x, h, KIND: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, WIDTH: tl.constexpr
):  # pragma: no cover
    """Return x' (BM, WIDTH) float32, columns permuted.

    inf and NaN must not reach other groups of their token where the scale is static; `h` holds
    several groups where GROUP < WIDTH, and 0 * inf is NaN. They are then counted apart.
    """
    if GROUP == 1:
        chunks = tl.reshape(x.to(tl.float32), (BM, WIDTH // 32, 4, 8))
        y = tl.reshape(tl.permute(chunks, (0, 1, 3, 2)), (BM, WIDTH))
    elif KIND == STATIC and GROUP < WIDTH:
        wide = x.to(tl.float32)
        finite = tl.abs(wide) < float("inf")
        sign = tl.where(wide == float("inf"), 1.0, tl.where(wide == -float("inf"), -1.0, 0.0))
        y = _product(tl.where(finite, wide, 0.0).to(x.dtype), h)
        signs = _product(sign.to(tl.float16), h)
        count = _product(tl.where(finite, 0.0, 1.0).to(tl.float16), tl.abs(h))
        beyond = tl.where(tl.abs(signs) == count, signs * float("inf"), float("nan"))
        y = tl.where(count == 0.0, y, beyond)
    else:
        y = _product(x, h)
    return y * (GROUP**-0.5)


@triton.jit
def _load(x, rows, columns, M, K):  # pragma: no cover
    """Return x at rows and columns, 0 outside."""
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    return tl.load(x + rows[:, None] * K + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _token_scale(
    x,
    h,
    rows,
    M,
    K,
    step,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    WIDTH: tl.constexpr,
    SUM_WIDTH: tl.constexpr,
):  # pragma: no cover
    """Return s_x (BM,) float32, NaN or inf where the token holds either (KIND 1 and 2)."""
    if KIND == TOKEN_RMS:
        squares = tl.full((BM, SUM_WIDTH), 0.0, tl.float32)
        for k in range(0, K, SUM_WIDTH):
            v = _load(x, rows, k + tl.arange(0, SUM_WIDTH), M, K).to(tl.float32)
            squares += v * v
        raw = tl.sqrt_rn(tl.sum(squares, axis=1) / K) * step
    elif KIND == TOKEN_ABSMAX:
        largest = tl.full((BM, WIDTH), 0.0, tl.float32)
        not_finite = tl.full((BM, WIDTH), 0.0, tl.float32)
        for k in range(0, K, WIDTH):
            v = _load(x, rows, k + tl.arange(0, WIDTH), M, K)
            rotated = _rotate(v, h, KIND, GROUP, BM, WIDTH)
            largest = tl.maximum(largest, tl.abs(rotated))
            not_finite += rotated * 0.0  # a maximum may drop NaN
        raw = tl.max(largest, axis=1) * step + tl.sum(not_finite, axis=1)
    else:
        raw = tl.full((BM,), 0.0, tl.float32) + step
    return tl.where(raw < SCALE_FLOOR, SCALE_FLOOR, raw)  # keeps NaN


@triton.jit(do_not_specialize=["M", "K", "qmin", "qmax"])
def quantize_tokens_kernel(
    x,
    codes,
    scale,
    M,
    K,
    KP,
    qmin,
    qmax,
    step,
    columns_per_program,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    WIDTH: tl.constexpr,
    SUM_WIDTH: tl.constexpr,
):  # pragma: no cover
    """Quantize BM tokens, columns program_id(1) * columns_per_program and following.

    Every program of a token finds its scale anew: few tokens are then still many programs.

    Args:
        x: (M, K) fp16, bf16 or fp32.
        codes: (M, KP) int8, interleaved; zeros from K to KP.
        scale: (M,) float32.
        M: Tokens.
        K: Channels, GROUP divides it.
        KP: K padded to a multiple of 128.
        qmin: Smallest code.
        qmax: Largest code.
        step: The layer's step, float32.
        columns_per_program: A multiple of WIDTH.
        KIND: Number of an `ActScale`.
        GROUP: Rotation, 1..128.
        BM: Tokens of a program.
        WIDTH: Columns of a step, a multiple of 32 and of GROUP that divides 128.
        SUM_WIDTH: Columns of a step of the sum of squares.
    """
    if GROUP >= 8:  # divides K: the compiler then sees it, and loads 16 bytes at once
        K = K // 8 * 8  # noqa: N806
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    h = _hadamard(GROUP, WIDTH)
    s_x = _token_scale(x, h, rows, M, K, step, KIND, GROUP, BM, WIDTH, SUM_WIDTH)
    if tl.program_id(1) == 0:
        tl.store(scale + rows, s_x, mask=rows < M)
    reciprocal = tl.div_rn(tl.full((BM,), 1.0, tl.float32), s_x)
    begin = tl.program_id(1) * columns_per_program
    for k in range(begin, tl.minimum(begin + columns_per_program, KP), WIDTH):
        v = _load(x, rows, k + tl.arange(0, WIDTH), M, K)
        scaled = _rotate(v, h, KIND, GROUP, BM, WIDTH) * reciprocal[:, None]
        scaled = tl.where(scaled == scaled, scaled, 0.0)
        clipped = tl.minimum(tl.maximum(scaled, qmin.to(tl.float32)), qmax.to(tl.float32))
        rounded = ((clipped + ROUND) - ROUND).to(tl.int8)
        columns = k + tl.arange(0, WIDTH)
        tl.store(codes + rows[:, None] * KP + columns[None, :], rounded, mask=(rows < M)[:, None])
