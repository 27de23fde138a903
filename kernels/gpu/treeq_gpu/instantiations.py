"""The written list of kernels that are compiled ahead: shape class x bits x tile x type.

Pure Python, so that whatever chooses, compiles, launches or documents a kernel reads the same list.
What is not in it still runs in PyTorch, where Triton compiles on demand.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from treeq_export.ops import ACT_SCALES, MAX_BITS, MAX_ROTATION, MIN_BITS, ActScale

DType = Literal["fp16", "bf16", "fp32"]
DTYPES: tuple[DType, ...] = ("fp16", "bf16", "fp32")
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
CODES_PADDING = 128  # columns of the codes are a multiple of this; every BK divides it
WEIGHT_BITS = range(MIN_BITS, MAX_BITS + 1)
GROUPED_BITS = (2, 3, 4, 8)
ROTATION_GROUPS = tuple(1 << i for i in range(MAX_ROTATION.bit_length()))


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of a step, and how many warps and load stages work on it."""

    bm: int
    bn: int
    bk: int
    num_warps: int
    num_stages: int

    @property
    def spread(self) -> bool:
        """Whether there are fewer weight words than threads, which then share them."""
        return self.bn * self.bk // 32 < 32 * self.num_warps


# Why these: README.md, "Tiles". `token` is bound by the weights' bytes, so all it needs is many
# programs and loads in flight; `small` fills the GPU where `wide`, the cheapest, cannot.
TILES = {
    "token": Tile(16, 64, 128, 4, 4),
    "small": Tile(64, 64, 128, 4, 3),
    "wide": Tile(128, 128, 128, 8, 3),
}
SHAPE_CLASSES = tuple(TILES)
# Scales per group need a second, fp32 accumulator, so `wide` is narrower.
GROUPED_TILES = TILES | {"wide": Tile(128, 64, 128, 8, 3)}
# Two programs of `wide` on one multiprocessor of sm_90: one decodes while the other's MMAs run.
# Costs spills in the epilogue, none in the main loop, which would spill elsewhere and at 8 bits.
WIDE_MAX_REGISTERS = {"sm_90": 128}
FINISH_TILE = (4, 256)
MONARCH_TILES = {"token": Tile(16, 64, 64, 4, 3), "wide": Tile(64, 64, 32, 4, 3)}
QUANTIZE_ROWS = 16
QUANTIZE_WIDTH = 128
QUANTIZE_SUM_WIDTH = 256

# Parameters as launched: name, type ("T" is the type of x and y); the C++ plugin passes them.
_QLINEAR_IN = (("codes", "*i8"), ("planes", "*i32"))
_EPILOGUE = (
    ("act_scale", "*fp32"),
    ("weight_scale", "*fp32"),
    ("bias", "*fp32"),
    ("addend", "*T"),
    ("y", "*T"),
    ("M", "i32"),
    ("N", "i32"),
)
_FLAGS = (("has_bias", "i32"), ("has_addend", "i32"))
SIGNATURES: dict[str, tuple[tuple[str, str], ...]] = {
    "quantize_tokens_kernel": (
        ("x", "*T"),
        ("codes", "*i8"),
        ("scale", "*fp32"),
        ("M", "i32"),
        ("K", "i32"),
        ("KP", "i32"),
        ("qmin", "i32"),
        ("qmax", "i32"),
        ("step", "fp32"),
        ("columns_per_program", "i32"),
    ),
    "qlinear_kernel": (
        *_QLINEAR_IN,
        *_EPILOGUE,
        ("KP", "i32"),
        ("KW", "i32"),
        ("num_groups", "i32"),
        *_FLAGS,
    ),
    "qlinear_partials_kernel": (
        *_QLINEAR_IN,
        ("partials", "*i32"),
        ("M", "i32"),
        ("N", "i32"),
        ("KP", "i32"),
        ("KW", "i32"),
        ("k_per_split", "i32"),
    ),
    "finish_kernel": (("partials", "*i32"), *_EPILOGUE, ("num_splits", "i32"), *_FLAGS),
    "monarch_in_kernel": (
        ("x", "*T"),
        ("R", "*T"),
        ("z", "*T"),
        ("M", "i32"),
        ("block_in", "i32"),
        ("b_in", "i32"),
        ("b_out", "i32"),
        ("rank", "i32"),
    ),
    "monarch_out_kernel": (
        ("z", "*T"),
        ("L", "*T"),
        ("y", "*T"),
        ("M", "i32"),
        ("inner", "i32"),
        ("block_out", "i32"),
        ("b_out", "i32"),
    ),
}
# Arguments known to be multiples of 16 beside the pointers, whose addresses are.
DIVISIBLE_BY_16 = ("KP", "k_per_split", "columns_per_program")


@dataclass(frozen=True)
class Instantiation:
    """One kernel with its compile-time arguments.

    Attributes:
        name: A C identifier, unique.
        kernel: The function, a key of `SIGNATURES`.
        module: The module of `treeq_gpu` that holds it.
        dtype: What "T" is; fp32 where the kernel has none.
        constants: Compile-time arguments.
        num_warps: Warps of 32 threads in a program.
        num_stages: Steps of the main loop whose loads are in flight.
        shape_class: "token", "small" or "wide"; empty where there is only one.
        max_registers: Registers of a thread, by architecture; others decide for themselves.
    """

    name: str
    kernel: str
    module: str
    dtype: DType
    constants: dict[str, int] = field(hash=False)
    num_warps: int
    num_stages: int
    shape_class: str = ""
    max_registers: dict[str, int] = field(hash=False, default_factory=dict)

    def options(self, architecture: str) -> dict[str, int | bool]:
        """Return the compiler's options, the same ahead of time and on demand.

        Args:
            architecture: GPU architecture, such as "sm_90".
        """
        limit = self.max_registers.get(architecture)
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        } | ({"maxnreg": limit} if limit else {})

    @property
    def params(self) -> list[tuple[str, str]]:
        """(name, type) of each argument of a launch, in order."""
        return [(name, kind.replace("T", self.dtype)) for name, kind in SIGNATURES[self.kernel]]


def tile_of(shape_class: str, step: int = 0) -> Tile:
    """Return the tile of a shape class; `step` as in `qlinear`."""
    if not step:
        return TILES[shape_class]
    # Four warps where eight would share words: decoding then costs each thread too much.
    num_warps = 4 if step < 128 else GROUPED_TILES[shape_class].num_warps
    return replace(GROUPED_TILES[shape_class], bk=step, num_warps=num_warps)


def _shape(tile: Tile) -> dict[str, int]:
    return {"BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "SPREAD": int(tile.spread)}


def qlinear(
    weight_bits: int, shape_class: str, dtype: DType, step: int = 0, *, sums: bool = False
) -> Instantiation:
    """Return the kernel of a whole product.

    Args:
        weight_bits: 2..8.
        shape_class: A key of `TILES`.
        dtype: Type of y.
        step: 0 for scales per channel; 32, 64 or 128, the channels of a step, for scales per group.
        sums: Store int32 sums instead of y (tests).
    """
    tile = tile_of(shape_class, step)
    capped = shape_class == "wide" and not step and weight_bits < 8
    group = f"_g{step}" if step else ""
    return Instantiation(
        f"qlinear_w{weight_bits}{group}_{shape_class}_{'sums' if sums else dtype}",
        "qlinear_kernel",
        "qlinear",
        dtype,
        {"BITS": weight_bits, "GROUP_SIZE": step, **_shape(tile), "SUMS": int(sums)},
        tile.num_warps,
        tile.num_stages,
        shape_class,
        WIDE_MAX_REGISTERS if capped else {},
    )


def partials(weight_bits: int, shape_class: str) -> Instantiation:
    """Return the kernel of a slice of K."""
    tile = TILES[shape_class]
    return Instantiation(
        f"qlinear_partials_w{weight_bits}_{shape_class}",
        "qlinear_partials_kernel",
        "qlinear",
        "fp32",
        {"BITS": weight_bits, **_shape(tile)},
        tile.num_warps,
        tile.num_stages,
        shape_class,
    )


def finish(dtype: DType) -> Instantiation:
    """Return the kernel that adds slices of K."""
    bm, bn = FINISH_TILE
    name = f"finish_{dtype}"
    return Instantiation(name, "finish_kernel", "qlinear", dtype, {"BM": bm, "BN": bn}, 4, 2)


def quantize(act_scale: ActScale, rotation_group: int, dtype: DType) -> Instantiation:
    """Return the kernel that quantizes tokens."""
    # Static scales keep inf and NaN in their group, which costs more where a step holds several.
    width = max(rotation_group, 32) if act_scale.is_static else QUANTIZE_WIDTH
    return Instantiation(
        f"quantize_{act_scale.statistic}_h{rotation_group}_{dtype}",
        "quantize_tokens_kernel",
        "quantize_tokens",
        dtype,
        {
            "KIND": act_scale.number,
            "GROUP": rotation_group,
            "BM": QUANTIZE_ROWS,
            "WIDTH": width,
            "SUM_WIDTH": QUANTIZE_SUM_WIDTH,
        },
        4,
        3,
    )


def monarch(half: Literal["in", "out"], shape_class: str, dtype: DType) -> Instantiation:
    """Return the kernel of one half of the branch, the product with R ("in") or with L ("out").

    Args:
        half: Which.
        shape_class: A key of `MONARCH_TILES`.
        dtype: Type of x, R, L and y.
    """
    tile = MONARCH_TILES[shape_class]
    return Instantiation(
        f"monarch_{half}_{shape_class}_{dtype}",
        f"monarch_{half}_kernel",
        "monarch",
        dtype,
        {"BM": tile.bm, "BN": tile.bn, "BK": tile.bk},
        tile.num_warps,
        tile.num_stages,
        shape_class,
    )


def _list() -> list[Instantiation]:
    per_channel = [
        qlinear(bits, shape_class, dtype)
        for dtype in DTYPES
        for bits in (WEIGHT_BITS if dtype == "fp16" else (3, 4))
        for shape_class in SHAPE_CLASSES
    ]
    slices = [
        partials(bits, shape_class) for bits in WEIGHT_BITS for shape_class in ("token", "small")
    ]
    grouped = [
        qlinear(bits, shape_class, "fp16", step)
        for bits in GROUPED_BITS
        for step in (32, 64, 128)
        for shape_class in SHAPE_CLASSES
    ]
    quantizers = [
        quantize(act_scale, group, dtype)
        for act_scale in ACT_SCALES
        for dtype in DTYPES
        for group in (ROTATION_GROUPS if dtype == "fp16" else (1, 32, 64, 128))
    ]
    branches = [
        monarch(half, shape_class, dtype)
        for dtype in DTYPES
        for half in ("in", "out")
        for shape_class in MONARCH_TILES
    ]
    return [*per_channel, *slices, *grouped, *map(finish, DTYPES), *quantizers, *branches]


INSTANTIATIONS: dict[str, Instantiation] = {i.name: i for i in _list()}
