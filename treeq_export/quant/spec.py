"""Number formats of a quantized linear, and which shapes they fit.

Weights are levels of a grid (quant/grids) of 2..8 bits with one float32 scale per output channel,
or per group of `group_size` input channels. Activations are levels of 2..8 bits with one scale per
token (derived from the token's rms or absolute maximum) or one static scale per tensor; `none`
keeps them in floating point (weight-only quantization).
"""

from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from treeq_export.errors import FormatError
from treeq_export.ops import MAX_BITS, MIN_BITS, ActScale
from treeq_export.quant.grids import INTEGER, Grid, find_grid

Bits = Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)]


def _check_name(name: str) -> str:
    try:
        return find_grid(name).name
    except FormatError as error:
        raise ValueError(str(error)) from error


# Files name every grid but the first one.
GridName = Annotated[
    str, AfterValidator(_check_name), Field(exclude_if=lambda name: name == INTEGER.name)
]


def check_width(grid: str, bits: int | None) -> None:
    """Check that a grid has a width.

    Raises:
        ValueError: It does not.
    """
    widths = find_grid(grid).widths
    if bits is not None and bits not in widths:
        raise ValueError(f"grid {grid} has no {bits} bits. Use one of {list(widths)}")


class Spec(BaseModel):
    """Base of all records of a plan: strict types, no unknown fields, immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class WeightFormat(Spec):
    """Format of a weight.

    Attributes:
        bits: Bits per code, 2..8.
        group_size: Input channels that share a scale; None is one scale per output channel.
        grid: Name of the grid.
    """

    bits: Bits
    group_size: Annotated[int, Field(ge=1)] | None = None
    grid: GridName = INTEGER.name

    @property
    def numbers(self) -> Grid:
        """The grid."""
        return find_grid(self.grid)

    @model_validator(mode="after")
    def _grid_has_the_width(self) -> Self:
        check_width(self.grid, self.bits)
        return self


class ActivationFormat(Spec):
    """Format of an activation.

    Attributes:
        bits: Bits per code, 2..8; None exactly where `scale` is "none".
        scale: Source of the scale: each token's rms or absolute maximum, static for the
            whole tensor (calibrated), or not quantized at all.
        grid: Name of the grid.
    """

    bits: Bits | None
    scale: Annotated[ActScale, Field(strict=False)]
    grid: GridName = INTEGER.name

    @property
    def numbers(self) -> Grid:
        """The grid."""
        return find_grid(self.grid)

    @model_validator(mode="after")
    def _bits_match_scale_and_grid(self) -> Self:
        if (self.bits is None) != (self.scale is ActScale.NONE):
            raise ValueError("bits is null exactly where scale is 'none'")
        check_width(self.grid, self.bits)
        return self


class BranchFormat(Spec):
    """Shape of a Monarch branch: b_out x b_in blocks of rank `rank`; (1, 1, r) is low rank.

    Attributes:
        b_in: Number of blocks along the input channels.
        b_out: Number of blocks along the output channels.
        rank: Rank of each block.
    """

    b_in: Annotated[int, Field(ge=1)]
    b_out: Annotated[int, Field(ge=1)]
    rank: Annotated[int, Field(ge=1)]

    def num_parameters(self, in_features: int, out_features: int) -> int:
        """Return r (N b_in + K b_out), the number of parameters of both factors."""
        return self.rank * (out_features * self.b_in + in_features * self.b_out)


def nearest_divisors(value: int, target: int, *, powers_of_two: bool = False) -> list[int]:
    """Return the divisors of `value` nearest to `target`: one below (or equal) and one above.

    >>> nearest_divisors(1152, 80)
    [72, 96]
    >>> nearest_divisors(1152, 80, powers_of_two=True)
    [64, 128]
    """
    divisors = [d for d in range(1, value + 1) if value % d == 0]
    if powers_of_two:
        divisors = [d for d in divisors if d & (d - 1) == 0]
    below = [d for d in divisors if d <= target][-1:]
    above = [d for d in divisors if d > target][:1]
    return below + above


def _remedy(nearest: list[int]) -> str:
    do = "The nearest that do are" if len(nearest) > 1 else "The nearest that does is"
    return f"{do} {' and '.join(str(d) for d in nearest)}."


def check_divides(layer: str, what: str, size: int, in_features: int, *, power: bool) -> None:
    """Check that a group or rotation size fits a layer.

    Args:
        layer: Name of the layer, for the message.
        what: "group_size" or "rotation_group".
        size: The size to check.
        in_features: K of the layer.
        power: Whether the size has to be a power of two as well.

    Raises:
        FormatError: The size does not divide K, or is no power of two.
    """
    if size < 1 or in_features % size or (power and size & (size - 1)):
        nearest = nearest_divisors(in_features, max(size, 1), powers_of_two=power)
        kind = "is no power of two that divides" if power else "does not divide"
        raise FormatError(
            f"{layer}: {what} {size} {kind} in_features {in_features}. {_remedy(nearest)}"
        )


def check_branch(layer: str, branch: BranchFormat, in_features: int, out_features: int) -> None:
    """Check that a branch's block grid divides a layer.

    Raises:
        FormatError: b_in does not divide K, b_out does not divide N, or the rank is too high.
    """
    for what, blocks, size in (
        ("b_in", branch.b_in, in_features),
        ("b_out", branch.b_out, out_features),
    ):
        if size % blocks:
            remedy = _remedy(nearest_divisors(size, blocks))
            raise FormatError(f"{layer}: branch {what} {blocks} does not divide {size}. {remedy}")
    limit = min(in_features // branch.b_in, out_features // branch.b_out)
    if branch.rank > limit:
        raise FormatError(
            f"{layer}: branch rank {branch.rank} exceeds its block "
            f"{out_features // branch.b_out}x{in_features // branch.b_in}. Use at most {limit}."
        )
