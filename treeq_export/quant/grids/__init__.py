"""The number grids: which integers a code of so many bits stands for.

A grid is one file with one `Grid`, and an entry in GRIDS. docs/extending.md says how to add one.
"""

from treeq_export.errors import FormatError
from treeq_export.quant.grids.grid import Cells, Grid
from treeq_export.quant.grids.integer import INTEGER

__all__ = [
    "ACT_GRID",
    "GRIDS",
    "INTEGER",
    "WEIGHT_GRID",
    "Cells",
    "Grid",
    "find_grid",
    "grid_attributes",
]

GRIDS: tuple[Grid, ...] = (INTEGER,)
WEIGHT_GRID, ACT_GRID = "weight_grid", "act_grid"  # attributes of a `treeq::QLinear` node


def find_grid(name: str) -> Grid:
    """Return the grid of that name.

    Raises:
        FormatError: There is none.
    """
    for grid in GRIDS:
        if grid.name == name:
            return grid
    known = ", ".join(grid.name for grid in GRIDS)
    raise FormatError(f"grid {name}: unknown, expected one of {known}.")


def grid_attributes(weight: str, activation: str) -> dict[str, str]:
    """Return the attributes that name a node's grids; a node without one has the grid `integer`."""
    names = {WEIGHT_GRID: weight, ACT_GRID: activation}
    return {attribute: name for attribute, name in names.items() if name != INTEGER.name}
