"""Pass `FuseOutput`: what follows a linear: GELU, or adaLN's gate and the residual.

Rules:
1. Gelu with approximate="tanh" of a packed node's only output, read by nothing else, becomes its
   activation.
2. residual + Unsqueeze(gate) * y, gate (batch, N), y as above, becomes its gate and residual. It
   may follow rule 1.
3. The sites of the layers have no output value any more.
"""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from treeq_export.compile.graph.fused import (
    GATE,
    RESIDUAL,
    activation_of,
    forget_values,
    input_of,
    only_user,
    packed_nodes,
    widen,
)
from treeq_export.compile.passes.fuse_modulate import both_ways, is_row_of, unsqueezed


class FuseOutput(InPlacePass):
    """Fuse what follows; ensures that no such GELU or gate is left behind a packed node."""

    def call(self, model: ir.Model) -> PassResult:
        """Change the graph in place."""
        fused = set()
        for node in packed_nodes(model):
            name = node.name
            activated = _fuse_gelu(model.graph, node)
            gated = _fuse_gate(model.graph, activated or node)
            if activated or gated:
                fused.add(name)
        forget_values(model, fused, output="")
        RemoveUnusedNodesPass()(model)  # what was fused still reads its inputs
        return PassResult(model, bool(fused))


def _fuse_gelu(graph: ir.Graph, node: ir.Node) -> ir.Node | None:
    if len(node.outputs) > 1 or activation_of(node) != "none" or input_of(node, GATE) is not None:
        return None
    gelu = only_user(node.outputs[0])
    if gelu is None or gelu.op_type != "Gelu" or gelu.domain:
        return None
    if gelu.attributes.get_string("approximate", "none") != "tanh":
        return None
    return widen(graph, node, {}, [gelu.outputs[0]], activation="gelu_tanh")


def _fuse_gate(graph: ir.Graph, node: ir.Node) -> ir.Node | None:
    if len(node.outputs) > 1 or input_of(node, GATE) is not None:
        return None
    y = node.outputs[0]
    product = only_user(y)
    if product is None or product.op_type != "Mul":
        return None
    gates = [unsqueezed(gate) for value, gate in both_ways(product) if value is y]
    total = only_user(product.outputs[0])
    if not gates or gates[0] is None or total is None or total.op_type != "Add":
        return None
    residual = next(v for value, v in both_ways(total) if value is product.outputs[0])
    if residual is None or residual.shape != y.shape or not is_row_of(gates[0], y):
        return None
    return widen(graph, node, {GATE: gates[0], RESIDUAL: residual}, [total.outputs[0]])
