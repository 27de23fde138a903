"""Pass `FuseBranch`: a quantized linear and the Monarch branch that is added to it.

Rules:
1. QLinear(x) + Monarch(x) becomes FusedQLinear(x) with the factors as inputs branch_R, branch_L,
   where neither product is read by anything else.
"""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from treeq_export.compile.graph.fused import BRANCH_L, BRANCH_R, X, input_of, only_user, widen
from treeq_export.compile.graph.signature import MONARCH, QLINEAR, nodes_of


class FuseBranch(InPlacePass):
    """Fuse branches into their layers; ensures that no QLinear + Monarch of one input is left."""

    def call(self, model: ir.Model) -> PassResult:
        """Change the graph in place."""
        modified = False
        for node in nodes_of(model, QLINEAR):
            monarch = find_branch(node)
            if monarch is not None:
                add = only_user(node.outputs[0])
                assert add is not None
                factors = {BRANCH_R: monarch.inputs[1], BRANCH_L: monarch.inputs[2]}
                widen(model.graph, node, factors, [add.outputs[0]])
                modified = True
        RemoveUnusedNodesPass()(model)  # what was fused still reads its inputs
        return PassResult(model, modified)


def find_branch(node: ir.Node) -> ir.Node | None:
    """Return the Monarch of a layer's input whose sum with the layer is all that is read."""
    add = only_user(node.outputs[0])
    if add is None or add.op_type != "Add":
        return None
    for value in add.inputs:
        producer = None if value is None else value.producer()
        if (
            producer is not None
            and producer.op_type == MONARCH
            and producer.inputs[0] is input_of(node, X)
            and only_user(producer.outputs[0]) is add
        ):
            return producer
    return None
