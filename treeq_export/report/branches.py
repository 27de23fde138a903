"""Which branch shapes the search chose, and what they were chosen from."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BranchChoice:
    """The choice for one layer.

    Attributes:
        layer: Name of the layer.
        chosen: The shape of least error, such as "2x4 r3".
        error: Relative squared output error of that shape.
        low_rank: That of plain low rank; None where it was not tried.
        square: That of the best grid with equal sides above one; None where none was tried.
        num_tried: Shapes that were tried.
    """

    layer: str
    chosen: str
    error: float
    low_rank: float | None
    square: float | None
    num_tried: int


@dataclass(frozen=True)
class BranchTable:
    """The choices of all layers.

    Attributes:
        choices: In execution order.
        shapes: Grid and number of layers, most frequent first.
        num_better: Layers whose shape has less error than plain low rank.
    """

    choices: tuple[BranchChoice, ...]
    shapes: tuple[tuple[str, int], ...]
    num_better: int


def tabulate_branches(trials: Mapping[str, Sequence[Mapping[str, Any]]]) -> BranchTable:
    """Return the choices from `SearchRecord.branches`."""
    choices = tuple(_choose(layer, tried) for layer, tried in trials.items() if tried)
    grids = Counter(choice.chosen.split()[0] for choice in choices)
    return BranchTable(
        choices=choices,
        shapes=tuple(sorted(grids.items(), key=lambda item: (-item[1], item[0]))),
        num_better=sum(c.low_rank is not None and c.error < c.low_rank for c in choices),
    )


def _choose(layer: str, tried: Sequence[Mapping[str, Any]]) -> BranchChoice:
    best = min(tried, key=lambda trial: trial["error"])
    low_rank = [trial["error"] for trial in tried if trial["b_in"] == trial["b_out"] == 1]
    square = [trial["error"] for trial in tried if trial["b_in"] == trial["b_out"] > 1]
    return BranchChoice(
        layer=layer,
        chosen=f"{best['b_out']}x{best['b_in']} r{best['rank']}",
        error=best["error"],
        low_rank=min(low_rank, default=None),
        square=min(square, default=None),
        num_tried=len(tried),
    )
