"""Number formats and the messages for shapes that they do not fit."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from treeq_export.errors import FormatError
from treeq_export.quant.spec import (
    ActivationFormat,
    BranchFormat,
    WeightFormat,
    check_branch,
    check_divides,
    nearest_divisors,
)


@given(value=st.integers(1, 5000), target=st.integers(1, 6000), powers=st.booleans())
def test_nearest_divisors_enclose_the_target(value: int, target: int, powers: bool):
    found = nearest_divisors(value, target, powers_of_two=powers)
    allowed = [
        d for d in range(1, value + 1) if value % d == 0 and (not powers or d.bit_count() == 1)
    ]
    below = max((d for d in allowed if d <= target), default=None)
    above = min((d for d in allowed if d > target), default=None)
    assert found == [d for d in (below, above) if d is not None]
    assert found


@pytest.mark.parametrize(
    ("what", "size", "in_features", "power", "message"),
    [
        (
            "group_size",
            80,
            1152,
            False,
            "group_size 80 does not divide in_features 1152. The nearest that do are 72 and 96.",
        ),
        (
            "group_size",
            4096,
            1152,
            False,
            "group_size 4096 does not divide in_features 1152. The nearest that does is 1152.",
        ),
        (
            "rotation_group",
            96,
            1152,
            True,
            (
                "rotation_group 96 is no power of two that divides in_features 1152. "
                "The nearest that do are 64 and 128."
            ),
        ),
        (
            "rotation_group",
            256,
            1152,
            True,
            (
                "rotation_group 256 is no power of two that divides in_features 1152. "
                "The nearest that does is 128."
            ),
        ),
        (
            "rotation_group",
            2,
            7,
            True,
            (
                "rotation_group 2 is no power of two that divides in_features 7. "
                "The nearest that does is 1."
            ),
        ),
        (
            "group_size",
            0,
            8,
            False,
            "group_size 0 does not divide in_features 8. The nearest that do are 1 and 2.",
        ),
        (
            "rotation_group",
            -4,
            8,
            True,
            (
                "rotation_group -4 is no power of two that divides in_features 8. "
                "The nearest that do are 1 and 2."
            ),
        ),
    ],
)
def test_check_divides_names_the_nearest(
    what: str, size: int, in_features: int, power: bool, message: str
):
    with pytest.raises(FormatError) as error:
        check_divides("blocks.3.mlp.fc1", what, size, in_features, power=power)
    assert str(error.value) == f"blocks.3.mlp.fc1: {message}"


@given(in_features=st.integers(1, 2000), size=st.integers(1, 2000), power=st.booleans())
def test_check_divides_accepts_exactly_what_divides(in_features: int, size: int, power: bool):
    fits = in_features % size == 0 and (not power or size.bit_count() == 1)
    try:
        check_divides("layer", "size", size, in_features, power=power)
    except FormatError:
        assert not fits
    else:
        assert fits


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (
            (5, 1, 1),
            "fc1: branch b_in 5 does not divide 96. The nearest that do are 4 and 6.",
        ),
        (
            (1, 7, 1),
            "fc1: branch b_out 7 does not divide 64. The nearest that do are 4 and 8.",
        ),
        (
            (1, 100, 1),
            "fc1: branch b_out 100 does not divide 64. The nearest that does is 64.",
        ),
        ((4, 1, 25), "fc1: branch rank 25 exceeds its block 64x24. Use at most 24."),
        ((1, 8, 9), "fc1: branch rank 9 exceeds its block 8x96. Use at most 8."),
    ],
)
def test_check_branch_messages(branch: tuple[int, int, int], message: str):
    b_in, b_out, rank = branch
    with pytest.raises(FormatError) as error:
        check_branch("fc1", BranchFormat(b_in=b_in, b_out=b_out, rank=rank), 96, 64)
    assert str(error.value) == message


@pytest.mark.parametrize("branch", [(1, 1, 64), (4, 1, 24), (96, 64, 1), (3, 8, 8)])
def test_check_branch_accepts_the_largest_rank(branch: tuple[int, int, int]):
    b_in, b_out, rank = branch
    fits = BranchFormat(b_in=b_in, b_out=b_out, rank=rank)
    check_branch("fc1", fits, 96, 64)
    with pytest.raises(FormatError, match=f"Use at most {rank}"):
        check_branch("fc1", fits.model_copy(update={"rank": rank + 1}), 96, 64)


@pytest.mark.parametrize("scale", ["token_rms", "token_absmax", "tensor_static"])
def test_activation_bits_belong_to_a_scale(scale: Any):
    assert ActivationFormat(bits=4, scale=scale).bits == 4
    with pytest.raises(ValidationError, match="bits is null exactly where scale is 'none'"):
        ActivationFormat(bits=None, scale=scale)


def test_no_scale_means_no_bits():
    assert ActivationFormat(bits=None, scale="none").bits is None
    with pytest.raises(ValidationError, match="bits is null exactly where scale is 'none'"):
        ActivationFormat(bits=8, scale="none")


@pytest.mark.parametrize("bits", [1, 9, 4.0, "4", True])
def test_bits_are_integers_of_2_to_8(bits: Any):
    with pytest.raises(ValidationError, match="bits"):
        WeightFormat(bits=bits)
    with pytest.raises(ValidationError, match="bits"):
        ActivationFormat(bits=bits, scale="token_rms")


@pytest.mark.parametrize(
    "fields", [{"bits": 4, "group_size": 0}, {"bits": 4, "grup_size": 32}, {"group_size": 32}]
)
def test_weight_format_is_strict(fields: dict[str, Any]):
    with pytest.raises(ValidationError):
        WeightFormat(**fields)


@pytest.mark.parametrize("field", ["b_in", "b_out", "rank"])
def test_branch_shape_is_positive(field: str):
    with pytest.raises(ValidationError, match=field):
        BranchFormat(**({"b_in": 1, "b_out": 1, "rank": 1} | {field: 0}))


def test_formats_are_immutable_and_hashable():
    weight = WeightFormat(bits=4)
    with pytest.raises(ValidationError, match="frozen"):
        weight.bits = 5  # pyright: ignore[reportAttributeAccessIssue]
    assert len({weight, WeightFormat(bits=4), WeightFormat(bits=4, group_size=32)}) == 2
