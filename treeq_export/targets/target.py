"""What a target is."""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import InPlacePass

from treeq_export.compile.audits.onnx_runtime import Audit
from treeq_export.runners.graph_meta import TARGET_KEY
from treeq_export.runners.ways import Way
from treeq_export.targets.names import ENGINES


@dataclass(frozen=True)
class Target:
    """One kind of compiled graph.

    Attributes:
        name: The name in recipes, records and folders.
        passes: The passes that turn an exported graph into this one, in order.
        ways: The ways to run it, the usual one first. Those behind it do without our library, so
            they differ from it only where that is installed.
        audit: The audit of the written file; None where no layer is quantized.
    """

    name: str
    passes: tuple[InPlacePass, ...]
    ways: tuple[Way, ...]
    audit: Audit | None

    @property
    def is_engine(self) -> bool:
        """Whether the graph is made to be built into an engine."""
        return self.name in ENGINES

    @property
    def different_ways(self) -> Sequence[Way]:
        """The ways that differ on this machine."""
        return self.ways if self.ways[0].uses_kernels else self.ways[:1]

    def lower(self, model: ir.Model) -> ir.Model:
        """Apply the passes to a freshly exported graph, in place, and return it."""
        for rewrite in self.passes:
            rewrite(model)
        model.metadata_props[TARGET_KEY] = self.name
        return model
