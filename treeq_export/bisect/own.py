"""The first layer, in execution order, whose own error, codes or sums are out of bounds.

Every layer is fed with the reference's input, so a fault is found where it is and nowhere else. The
layers' outputs inside the network say besides where an error first becomes visible there.
"""

from collections.abc import Iterable

from treeq_export.recipe import ParityGates
from treeq_export.records import LayerParity, Record
from treeq_export.validate.gates import missed_bounds


class BisectRecord(Record):
    """Result of bisect.

    Attributes:
        target: The target that was compared with the reference.
        layer: The first layer out of bounds; None where all are within.
        reasons: The bounds that this layer misses, with value and limit.
        parity: That layer's comparison; None where only the whole network could be run.
        departed: The first layer whose output inside the network is too far from the
            reference's; None where none exists up to `layer`, or outputs inside are not known.
        num_examined: Layers that were looked at.
        num_layers: Layers of the plan.
        min_sqnr_db: Least SQNR of a layer that counts as within bounds.
    """

    target: str
    layer: str | None
    reasons: list[str]
    parity: LayerParity | None
    departed: str | None
    num_examined: int
    num_layers: int
    min_sqnr_db: float

    def sentence(self) -> str:
        """Return the result in words."""
        if self.layer is None:
            return f"{self.target}: all {self.num_layers} layers are within bounds."
        return (
            f"{self.target}: {self.layer} is the first layer out of bounds "
            f"({self.num_examined} of {self.num_layers}): {'; '.join(self.reasons)}."
        )


def find_first_fault(
    target: str, layers: Iterable[LayerParity], num_layers: int, limits: ParityGates
) -> BisectRecord:
    """Compare layers until one is out of bounds.

    Args:
        target: Name for the record.
        layers: Comparisons in execution order, made as they are asked for.
        num_layers: Number of all layers.
        limits: The bounds; inside the network `min_layer_sqnr_db` holds too.
    """
    least = limits.min_layer_sqnr_db
    found, reasons, departed, examined = None, [], None, 0
    for layer in layers:
        examined += 1
        inside = layer.propagated_sqnr_db
        if departed is None and inside is not None and not inside >= least:
            departed = layer.name
        reasons = missed_bounds(layer, limits)
        if reasons:
            found = layer
            break
    return BisectRecord(
        target=target,
        layer=None if found is None else found.name,
        reasons=reasons,
        parity=found,
        departed=departed,
        num_examined=examined,
        num_layers=num_layers,
        min_sqnr_db=least,
    )
