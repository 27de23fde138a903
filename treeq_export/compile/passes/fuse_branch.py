"""Pass `FuseBranch`: a quantized linear and the Monarch branch that is added to it.

Rules:
1. QLinear(x) + Monarch(x) becomes FusedQLinear(x) with the factors as inputs branch_R, branch_L,
   where neither product is read by anything else.
"""

from collections.abc import Iterator

import onnx_ir as ir

from treeq_export.compile.graph.contract import RewritePass
from treeq_export.compile.graph.fused import widen
from treeq_export.compile.graph.match import Branched, find_branches


class FuseBranch(RewritePass[Branched]):
    """Fuse branches into their layers; no QLinear + Monarch of one input is left."""

    def _find(self, model: ir.Model) -> Iterator[Branched]:
        return find_branches(model)

    def _rewrite(self, model: ir.Model, found: Branched) -> None:
        _, r, l_factor = found.monarch.inputs
        factors = {"branch_R": r, "branch_L": l_factor}
        widen(model.graph, found.layer, factors, [found.total])
