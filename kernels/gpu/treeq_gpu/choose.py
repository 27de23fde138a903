"""Which kernel runs a shape, and with which grid: integer rules that the C++ plugin repeats.

A launch of `treeq::QLinear` is quantize_tokens, then one product, or slices of K and a finish.
Tiles of y are spread over the GPU's multiprocessors (SMs). The widest tile is the cheapest per
product, so it is taken where it gives every SM work; smaller tiles fill the GPU where it does not,
and K is cut in slices where even those are too few.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from treeq_export.ops import PACK_WORD, LayerFormat
from treeq_gpu import instantiations as inst
from treeq_gpu.instantiations import CODES_PADDING, DType, Instantiation

TOKEN_ROWS = 16
MAX_SPLITS = 16
ALIGNMENT = 256  # bytes, of each part of the workspace
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: The instantiation; it need not be in the written list.
        grid: Programs along x, y and z.
        numbers: Arguments that follow from the sizes, by name.
    """

    kernel: Instantiation
    grid: Grid
    numbers: Mapping[str, float]

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return all arguments by name, in the kernel's order.

        Args:
            values: Tensors, or their addresses, and flags by name; those of other kernels may be
                among them.
        """
        found = {**values, **self.numbers}
        return {name: found[name] for name, _ in self.kernel.params}


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


def choose_qlinear(
    layer: LayerFormat, m: int, num_sms: int, dtype: DType = "fp16"
) -> tuple[Launch, ...]:
    """Return how a product is launched: whole, or in slices of K and a finish that adds them.

    Args:
        layer: The layer; group_size is 0 or a multiple of 32.
        m: Tokens, at least 1.
        num_sms: Multiprocessors of the GPU.
        dtype: Type of y.
    """
    n, k, bits, group = layer.out_features, layer.in_features, layer.weight_bits, layer.group_size
    shape_class = shape_class_of(m, n, num_sms)
    tiles = num_tiles(m, n, shape_class, group_step(group))
    bk = inst.TILES[shape_class].bk
    steps = padded(k) // bk
    wanted = 1
    if shape_class != "wide" and group == 0:
        wanted = max(1, min(num_sms // tiles, steps, MAX_SPLITS))
    k_per_split = ceil_div(steps, wanted) * bk
    splits = ceil_div(padded(k), k_per_split)
    size = {"M": m, "N": n}
    operands = {"KP": padded(k), "KW": ceil_div(k, PACK_WORD)}
    if splits == 1:
        kernel = inst.qlinear(bits, shape_class, dtype, group_step(group))
        numbers = {**size, **operands, "num_groups": layer.num_groups}
        return (Launch(kernel, (tiles, 1, 1), numbers),)
    bm, bn = inst.FINISH_TILE
    kernel = inst.partials(bits, shape_class)
    return (
        Launch(kernel, (tiles, splits, 1), {**size, **operands, "k_per_split": k_per_split}),
        Launch(
            inst.finish(dtype),
            (ceil_div(m, bm), ceil_div(n, bn), 1),
            {**size, "num_splits": splits},
        ),
    )


def num_splits(launches: tuple[Launch, ...]) -> int:
    """Return the slices of K of a product; 1 is a single launch that writes y."""
    return int(launches[-1].numbers.get("num_splits", 1))


def choose_quantize(layer: LayerFormat, m: int, num_sms: int, dtype: DType = "fp16") -> Launch:
    """Return how m tokens are quantized: columns are cut where rows alone leave SMs idle."""
    k, (qmin, qmax) = layer.in_features, layer.code_range
    rows = ceil_div(m, inst.QUANTIZE_ROWS)
    steps = padded(k) // CODES_PADDING
    columns = ceil_div(steps, max(1, min(steps, num_sms // rows))) * CODES_PADDING
    return Launch(
        inst.quantize(layer.act_scale, layer.rotation_group, dtype),
        (rows, ceil_div(padded(k), columns), 1),
        {
            "M": m,
            "K": k,
            "KP": padded(k),
            "qmin": qmin,
            "qmax": qmax,
            "step": float(layer.act_step),
            "columns_per_program": columns,
        },
    )


def choose_monarch(
    m: int,
    block_in: int,
    b_in: int,
    b_out: int,
    rank: int,
    block_out: int,
    dtype: DType = "fp16",
) -> tuple[Launch, Launch]:
    """Return how the branch is launched: the product with R, then that with L.

    Args:
        m: Tokens.
        block_in: Input channels of a block.
        b_in: Blocks along the input.
        b_out: Blocks along the output.
        rank: Rank of a block.
        block_out: Output channels of a block.
        dtype: Type of x, R, L and y.
    """
    shape_class = "token" if m <= TOKEN_ROWS else "wide"
    tile = inst.MONARCH_TILES[shape_class]
    rows, width = ceil_div(m, tile.bm), {"M": m, "b_out": b_out}
    return (
        Launch(
            inst.monarch("in", shape_class, dtype),
            (rows, ceil_div(b_out * rank, tile.bn), b_in),
            {**width, "block_in": block_in, "b_in": b_in, "rank": rank},
        ),
        Launch(
            inst.monarch("out", shape_class, dtype),
            (rows, ceil_div(block_out, tile.bn), b_out),
            {**width, "inner": b_in * rank, "block_out": block_out},
        ),
    )


def _aligned(size_bytes: int) -> int:
    return ceil_div(size_bytes, ALIGNMENT) * ALIGNMENT


def workspace_parts(layer: LayerFormat, m: int, splits: int) -> tuple[int, int, int]:
    """Return the bytes of codes, scales and partial sums, each padded to `ALIGNMENT`."""
    partial_bytes = 4 * splits * m * layer.out_features if splits > 1 else 0
    return _aligned(m * padded(layer.in_features)), _aligned(4 * m), _aligned(partial_bytes)


def workspace_bytes(layer: LayerFormat, m: int, num_sms: int) -> int:
    """Return the bytes of one `treeq::QLinear`: codes, then scales, then partial sums."""
    return sum(workspace_parts(layer, m, num_splits(choose_qlinear(layer, m, num_sms))))
