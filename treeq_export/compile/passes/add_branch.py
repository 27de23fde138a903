"""Pass `AddBranch`: a layer's Monarch branch becomes the addend of its `treeq::QLinear`.

Rules:
1. QLinear(x) + Monarch(x), where neither is read by anything else, becomes QLinear with the
   Monarch's output as its fifth input; a missing bias in between is left out. The sum's name stays.

The kernel then adds the branch in float32 before its one rounding, and a pass over y is saved.
"""

from collections.abc import Iterator

import onnx_ir as ir

from treeq_export import ops
from treeq_export.compile.graph.contract import RewritePass
from treeq_export.compile.graph.match import Branched, find_branches
from treeq_export.compile.graph.rewrite import replace_node
from treeq_export.compile.graph.signature import DOMAIN, QLINEAR
from treeq_export.runners.plain_layer import input_of

*_LINEAR, _ADDEND = ops.QLINEAR.inputs


class AddBranch(RewritePass[Branched]):
    """Add branches inside of their layers; no QLinear + Monarch of one input is left."""

    def _find(self, model: ir.Model) -> Iterator[Branched]:
        yield from (f for f in find_branches(model) if input_of(f.layer, _ADDEND) is None)

    def _rewrite(self, model: ir.Model, found: Branched) -> None:
        node = found.layer
        joined = ir.node(
            QLINEAR,
            [*(input_of(node, name) for name in _LINEAR), found.monarch.outputs[0]],
            attributes={name: attribute.value for name, attribute in node.attributes.items()},
            domain=DOMAIN,
            version=1,
            name=node.name,
        )
        replace_node(model.graph, found.total, [joined])
