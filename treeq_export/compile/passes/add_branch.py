"""Pass `AddBranch`: a layer's Monarch branch becomes the addend of its `treeq::QLinear`.

Rules:
1. QLinear(x) + Monarch(x), where neither is read by anything else, becomes QLinear with the
   Monarch's output as its fifth input; a missing bias in between is left out. The sum's name stays.

The kernel then adds the branch in float32 before its one rounding, and a pass over y is saved.
"""

from collections.abc import Iterator

import onnx_ir as ir

from treeq_export.compile.graph.contract import RewritePass
from treeq_export.compile.graph.match import Branched, find_branches, input_of
from treeq_export.compile.graph.rewrite import replace_node
from treeq_export.compile.graph.signature import DOMAIN, QLINEAR

ADDEND = 4


class AddBranch(RewritePass[Branched]):
    """Add branches inside of their layers; no QLinear + Monarch of one input is left."""

    def _find(self, model: ir.Model) -> Iterator[Branched]:
        yield from (f for f in find_branches(model) if input_of(f.layer, ADDEND) is None)

    def _rewrite(self, model: ir.Model, found: Branched) -> None:
        node = found.layer
        inputs = list(node.inputs) + [None] * (ADDEND - len(node.inputs))
        joined = ir.node(
            QLINEAR,
            [*inputs, found.monarch.outputs[0]],
            attributes={name: attribute.value for name, attribute in node.attributes.items()},
            domain=DOMAIN,
            version=1,
            name=node.name,
        )
        replace_node(model.graph, found.total, [joined])
