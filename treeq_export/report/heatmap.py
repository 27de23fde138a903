"""Bits per layer laid out as the network is: a row per position in the block, a column per block.

Blocks may differ (Flux has two kinds, an excluded layer leaves a hole): a cell holds the layers at
its place, usually one, possibly none.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from treeq_export.plan import LayerPlan, Plan
from treeq_export.report.quantities import format_bits


@dataclass(frozen=True)
class Cell:
    """One layer in the heat map.

    Attributes:
        weight: Weight bits as text.
        activation: Activation bits as text, "fp" where not quantized.
        has_branch: Whether a Monarch branch runs beside it.
        description: Name, shape and formats in one line.
    """

    weight: str
    activation: str
    has_branch: bool
    description: str


@dataclass(frozen=True)
class HeatMap:
    """Bits per layer over the network.

    Attributes:
        blocks: Block numbers, the columns, ascending.
        rows: Position and its cells, one list per block; positions in order of appearance.
        weights: (weight bits, number of layers), fewest bits first.
        activations: The same of activation bits; "fp" comes last.
    """

    blocks: tuple[int, ...]
    rows: tuple[tuple[str, tuple[tuple[Cell, ...], ...]], ...]
    weights: tuple[tuple[str, int], ...]
    activations: tuple[tuple[str, int], ...]


def describe_layer(layer: LayerPlan) -> str:
    """Return one line on a layer: name, shape, formats, rotation and branch."""
    activation = layer.activation
    parts = [
        f"{layer.name}: {layer.in_features} → {layer.out_features}",
        f"weight {layer.weight.bits} bit"
        + (f" per group of {layer.weight.group_size}" if layer.weight.group_size else ""),
        f"activation {activation.bits} bit, {activation.scale}"
        if activation.bits
        else "activation in floating point",
    ]
    if layer.rotation_group > 1:
        parts.append(f"Hadamard group {layer.rotation_group}")
    if layer.branch is not None:
        branch = layer.branch
        parts.append(f"branch {branch.b_out}x{branch.b_in} blocks of rank {branch.rank}")
    return "; ".join(parts)


def lay_out_bits(plan: Plan) -> HeatMap:
    """Lay the plan's layers out by block and position."""
    blocks = sorted({layer.tree.block for layer in plan.layers})
    places: dict[str, dict[int, list[Cell]]] = {}
    for layer in plan.layers:
        cell = Cell(
            weight=format_bits(layer.weight.bits),
            activation=format_bits(layer.activation.bits),
            has_branch=layer.branch is not None,
            description=describe_layer(layer),
        )
        row = places.setdefault(layer.tree.position, {})
        row.setdefault(layer.tree.block, []).append(cell)
    return HeatMap(
        blocks=tuple(blocks),
        rows=tuple(
            (position, tuple(tuple(row.get(block, ())) for block in blocks))
            for position, row in places.items()
        ),
        weights=_count_layers(layer.weight.bits for layer in plan.layers),
        activations=_count_layers(layer.activation.bits for layer in plan.layers),
    )


def _count_layers(bits: Iterable[int | None]) -> tuple[tuple[str, int], ...]:
    counts = Counter(bits)
    ordered = sorted(counts, key=lambda key: (key is None, key or 0))
    return tuple((format_bits(key), counts[key]) for key in ordered)
