"""Pass `AddBranch`: a layer's Monarch branch becomes the addend of its `treeq::QLinear`.

Rules:
1. QLinear(x) + Monarch(x), where neither is read by anything else, becomes QLinear with the
   Monarch's output as its fifth input; a missing bias in between is left out. The sum's name stays.

The kernel then adds the branch in float32 before its one rounding, and a pass over y is saved.
"""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from treeq_export.compile.graph.fused import only_user
from treeq_export.compile.graph.signature import DOMAIN, QLINEAR, nodes_of
from treeq_export.compile.passes.fuse_branch import find_branch

ADDEND = 4


class AddBranch(InPlacePass):
    """Add branches inside of their layers; ensures that no QLinear + Monarch is left."""

    def call(self, model: ir.Model) -> PassResult:
        """Change the graph in place."""
        modified = False
        for node in nodes_of(model, QLINEAR):
            monarch = find_branch(node)
            if monarch is not None:
                _add(model.graph, node, monarch)
                modified = True
        RemoveUnusedNodesPass()(model)
        return PassResult(model, modified)


def _add(graph: ir.Graph, node: ir.Node, monarch: ir.Node) -> None:
    add = only_user(node.outputs[0])
    assert add is not None
    old = add.outputs[0]
    inputs = list(node.inputs) + [None] * (ADDEND - len(node.inputs))
    joined = ir.node(
        QLINEAR,
        [*inputs, monarch.outputs[0]],
        attributes={name: attribute.value for name, attribute in node.attributes.items()},
        domain=DOMAIN,
        version=1,
        name=node.name,
    )
    new, name = joined.outputs[0], old.name
    new.type, new.shape = old.type, old.shape
    graph.insert_before(add, joined)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name, new.name = f"{name}/unused", name
    node.name = f"{node.name}/without_branch"
