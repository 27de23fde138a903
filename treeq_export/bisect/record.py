"""What bisect finds."""

from treeq_export.records import LayerParity, Record


class BisectRecord(Record):
    """Result of bisect.

    Attributes:
        target: What was compared with the reference.
        layer: The first layer out of bounds; None where all are within.
        reasons: What is out of bounds there, with value and limit.
        parity: That layer's comparison; None where only the whole network could be run.
        departed: The first layer whose output inside the network is too far from the
            reference's; None where there is none before `layer`, or outputs inside are not known.
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
