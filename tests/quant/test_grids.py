"""What holds for every number grid."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treeq_export.errors import FormatError
from treeq_export.quant.grids import GRIDS, Grid, find_grid
from treeq_export.quant.packing import pack, unpack

ALL = [pytest.param(grid, bits, id=f"{grid.name}-{bits}") for grid in GRIDS for bits in grid.widths]
every_width = pytest.mark.parametrize(("grid", "bits"), ALL)
X = np.linspace(-8, 8, 20_001)
DENSITY = np.exp(-0.5 * np.square(X)) / np.exp(-0.5 * np.square(X)).sum()


def gaussian_error(grid: Grid, bits: int, step: float) -> float:
    """Return the mean squared error of a unit Gaussian."""
    return float(np.sum(DENSITY * np.square(X - step * grid.round(X / step, bits))))


@every_width
def test_levels_are_ascending_bytes_that_fit_the_width(grid: Grid, bits: int):
    levels = grid.levels(bits)
    assert levels.dtype == np.int8
    assert 1 < len(levels) <= 1 << bits
    assert np.all(np.diff(levels.astype(int)) > 0)
    assert grid.ends(bits) == (levels[0], levels[-1])
    assert grid.magnitude(bits) == np.abs(levels.astype(int)).max()


@every_width
def test_rounding_gives_the_nearest_level_or_one_almost_as_near(grid: Grid, bits: int):
    levels = grid.levels(bits).astype(float)
    values = np.linspace(levels[0] - 1, levels[-1] + 1, 20_011)
    found = grid.round(values, bits)
    assert set(np.unique(found)) == set(levels)
    assert np.all(np.diff(found) >= 0)
    assert np.array_equal(grid.round(levels, bits), levels)
    nearest = np.abs(values[:, None] - levels).min(axis=1)
    slack = 0.0 if grid.cells is None else 0.5 / grid.cells(bits).per_unit
    assert np.all(np.abs(values - found) <= nearest + 2 * slack + 1e-9)
    assert np.array_equal(grid.round(np.array([-np.inf, np.inf]), bits), grid.ends(bits))


@every_width
def test_the_gaussian_step_is_the_best_one(grid: Grid, bits: int):
    step, largest = grid.gaussian_step[bits], grid.magnitude(bits)
    steps = np.geomspace(0.5 / largest, 6 / largest, 400)
    best = min(steps, key=lambda other: gaussian_error(grid, bits, other))
    least = gaussian_error(grid, bits, best)
    assert gaussian_error(grid, bits, step) <= 1.001 * least, f"the best step is near {best:.4f}"


@settings(deadline=None, max_examples=30)
@given(grid=st.sampled_from(GRIDS), place=st.integers(0, 6), seed=st.integers(0, 99))
def test_planes_come_back(grid: Grid, place: int, seed: int):
    bits = grid.widths[place % len(grid.widths)]
    levels = grid.levels(bits)
    chosen = levels[np.random.default_rng(seed).integers(0, len(levels), (3, 45))]
    assert np.array_equal(unpack(pack(chosen, bits, grid), 45, grid), chosen)


@every_width
def test_size_is_that_of_planes_scales_and_coefficients(grid: Grid, bits: int):
    expected = 4 * (bits * 10 + 3) + grid.num_coefficients(bits) * 3
    assert grid.size_bytes(bits, 10, 3) == expected


def test_names_are_unique_and_found():
    assert [find_grid(grid.name) for grid in GRIDS] == list(GRIDS)
    with pytest.raises(FormatError, match=r"^grid nf4: unknown, expected one of integer"):
        find_grid("nf4")
