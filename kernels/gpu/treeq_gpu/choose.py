"""Which kernel runs a shape, and with which grid: integer rules that the C++ plugin repeats.

A launch of `treeq::QLinear` is quantize_tokens, then one product, or slices of K and a finish.
Tiles of y are spread over the GPU's multiprocessors (SMs). The widest tile is the cheapest per
product, so it is taken where it gives every SM work; smaller tiles fill the GPU where it does not,
and K is cut in slices where even those are too few.
"""

from dataclasses import dataclass

from treeq_export.ops import ActScale
from treeq_gpu import instantiations as inst
from treeq_gpu.instantiations import CODES_PADDING, DType, Instantiation

TOKEN_ROWS = 16
MAX_SPLITS = 16
ALIGNMENT = 256  # bytes, of each part of the workspace
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class LinearLaunch:
    """How one product is launched.

    Attributes:
        instantiation: Name of the product's kernel.
        split_k: Slices of K; 1 is a single launch that writes y.
        k_per_split: Channels of a slice, a multiple of the kernel's BK.
        grid: Of the product.
        finish: Name of the kernel that adds slices, None where there is one slice.
        finish_grid: Its grid.
    """

    instantiation: str
    split_k: int
    k_per_split: int
    grid: Grid
    finish: str | None
    finish_grid: Grid | None


@dataclass(frozen=True)
class QuantizeLaunch:
    """How tokens are quantized: kernel, grid and the columns that one program writes."""

    instantiation: str
    grid: Grid
    columns_per_program: int


@dataclass(frozen=True)
class MonarchLaunch:
    """How the branch is launched: two kernels with their grids."""

    instantiation_in: str
    grid_in: Grid
    instantiation_out: str
    grid_out: Grid


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def padded(k: int) -> int:
    """Return KP, the columns of the codes of K channels."""
    return ceil_div(k, CODES_PADDING) * CODES_PADDING


def group_step(group_size: int) -> int:
    """Return the channels of a kernel's step for a group size, 0 for scales per channel.

    >>> [group_step(size) for size in (0, 32, 96, 192, 1152)]
    [0, 32, 32, 64, 128]
    """
    if group_size == 0:
        return 0
    return next(step for step in (128, 64, 32) if group_size % step == 0)


def num_tiles(m: int, n: int, shape_class: str, step: int = 0) -> int:
    """Return the tiles of y, (m, n); `step` as `group_step` returns it."""
    tile = inst.tile_of(shape_class, step)
    return ceil_div(m, tile.bm) * ceil_div(n, tile.bn)


def shape_class_of(m: int, n: int, num_sms: int) -> str:
    """Return "token", "small" or "wide"."""
    if m <= TOKEN_ROWS:
        return "token"
    return "wide" if num_tiles(m, n, "wide") >= num_sms else "small"


def choose_qlinear_instantiation(
    m: int, n: int, weight_bits: int, group_size: int, num_sms: int, dtype: DType
) -> Instantiation:
    """Return the kernel of an unsplit product; it need not be in the written list."""
    shape_class = shape_class_of(m, n, num_sms)
    return inst.qlinear(weight_bits, shape_class, dtype, group_step(group_size))


def choose_qlinear(
    m: int,
    n: int,
    k: int,
    weight_bits: int,
    group_size: int,
    num_sms: int,
    dtype: DType = "fp16",
) -> LinearLaunch:
    """Return how a product is launched.

    Args:
        m: Tokens, at least 1.
        n: Output channels.
        k: Input channels.
        weight_bits: 2..8.
        group_size: Channels of a weight scale, a multiple of 32 that divides k; 0 is all of them.
        num_sms: Multiprocessors of the GPU.
        dtype: Type of y.
    """
    shape_class = shape_class_of(m, n, num_sms)
    tiles = num_tiles(m, n, shape_class, group_step(group_size))
    bk = inst.TILES[shape_class].bk
    steps = padded(k) // bk
    wanted = 1
    if shape_class != "wide" and group_size == 0:
        wanted = max(1, min(num_sms // tiles, steps, MAX_SPLITS))
    k_per_split = ceil_div(steps, wanted) * bk
    splits = ceil_div(padded(k), k_per_split)
    if splits == 1:
        name = choose_qlinear_instantiation(m, n, weight_bits, group_size, num_sms, dtype).name
        return LinearLaunch(name, 1, padded(k), (tiles, 1, 1), None, None)
    bm, bn = inst.FINISH_TILE
    return LinearLaunch(
        inst.partials(weight_bits, shape_class).name,
        splits,
        k_per_split,
        (tiles, splits, 1),
        inst.finish(dtype).name,
        (ceil_div(m, bm), ceil_div(n, bn), 1),
    )


def choose_quantize(
    m: int, k: int, act_scale: ActScale, rotation_group: int, num_sms: int, dtype: DType = "fp16"
) -> QuantizeLaunch:
    """Return how tokens are quantized: columns are cut where rows alone leave SMs idle."""
    chosen = inst.quantize(act_scale, rotation_group, dtype)
    rows = ceil_div(m, inst.QUANTIZE_ROWS)
    steps = padded(k) // CODES_PADDING
    columns = ceil_div(steps, max(1, min(steps, num_sms // rows))) * CODES_PADDING
    return QuantizeLaunch(chosen.name, (rows, ceil_div(padded(k), columns), 1), columns)


def monarch_class(m: int) -> str:
    """Return "token" or "wide"."""
    return "token" if m <= TOKEN_ROWS else "wide"


def choose_monarch(
    m: int,
    block_in: int,
    b_in: int,
    b_out: int,
    rank: int,
    block_out: int,
    dtype: DType = "fp16",
) -> MonarchLaunch:
    """Return how the branch is launched.

    Args:
        m: Tokens.
        block_in: Input channels of a block.
        b_in: Blocks along the input.
        b_out: Blocks along the output.
        rank: Of a block.
        block_out: Output channels of a block.
        dtype: Type of x, R, L and y.
    """
    del block_in  # the depth of a block is one program's loop
    shape_class = monarch_class(m)
    tile = inst.MONARCH_TILES[shape_class]
    rows = ceil_div(m, tile.bm)
    return MonarchLaunch(
        inst.monarch("in", shape_class, dtype).name,
        (rows, ceil_div(b_out * rank, tile.bn), b_in),
        inst.monarch("out", shape_class, dtype).name,
        (rows, ceil_div(block_out, tile.bn), b_out),
    )


def _aligned(size_bytes: int) -> int:
    return ceil_div(size_bytes, ALIGNMENT) * ALIGNMENT


def workspace_parts(m: int, n: int, k: int, split_k: int) -> tuple[int, int, int]:
    """Return the bytes of codes, scales and partial sums, each padded to `ALIGNMENT`."""
    partial_bytes = 4 * split_k * m * n if split_k > 1 else 0
    return _aligned(m * padded(k)), _aligned(4 * m), _aligned(partial_bytes)


def workspace_bytes(m: int, n: int, k: int, weight_bits: int, group_size: int, num_sms: int) -> int:
    """Return the bytes of one `treeq::QLinear`: codes, then scales, then partial sums."""
    launch = choose_qlinear(m, n, k, weight_bits, group_size, num_sms)
    return sum(workspace_parts(m, n, k, launch.split_k))
