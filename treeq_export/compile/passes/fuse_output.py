"""Pass `FuseOutput`: what follows a linear: GELU, or adaLN's gate and the residual.

Rules:
1. Gelu with approximate="tanh" of a packed node's only output, read by nothing else, becomes its
   activation.
2. residual + Unsqueeze(gate) * y, gate (batch, N), y as above, becomes its gate and residual. It
   may follow rule 1.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import onnx_ir as ir

from treeq_export.compile.graph.contract import RewritePass
from treeq_export.compile.graph.fused import (
    activation_of,
    packed_nodes,
    widen,
)
from treeq_export.compile.graph.match import (
    both_ways,
    is_row_of,
    only_user,
    unsqueezed,
)
from treeq_export.runners.plain_layer import input_of


class Tail(NamedTuple):
    """What a node is to compute as well: the value, by these inputs and attributes."""

    node: ir.Node
    y: ir.Value
    inputs: Mapping[str, ir.Value]
    attributes: Mapping[str, Any]


class FuseOutput(RewritePass[Tail]):
    """Fuse what follows; no such GELU or gate is left behind a packed node."""

    def _find(self, model: ir.Model) -> Iterator[Tail]:
        for find in (_find_gelu, _find_gate):
            for node in packed_nodes(model):
                if len(node.outputs) == 1 and input_of(node, "gate") is None:
                    yield from find(node)

    def _rewrite(self, model: ir.Model, found: Tail) -> None:
        widen(model.graph, found.node, found.inputs, [found.y], None, **found.attributes)


def _find_gelu(node: ir.Node) -> Iterator[Tail]:
    gelu = only_user(node.outputs[0])
    if gelu is not None and (gelu.domain, gelu.op_type) == ("", "Gelu"):
        is_tanh = gelu.attributes.get_string("approximate", "none") == "tanh"
        if is_tanh and activation_of(node) == "none":
            yield Tail(node, gelu.outputs[0], {}, {"activation": "gelu_tanh"})


def _find_gate(node: ir.Node) -> Iterator[Tail]:
    y = node.outputs[0]
    product = only_user(y)
    if product is None or product.op_type != "Mul":
        return
    total = only_user(product.outputs[0])
    if total is None or total.op_type != "Add":
        return
    gate = next((unsqueezed(gate) for value, gate in both_ways(product) if value is y), None)
    residual = next(v for value, v in both_ways(total) if value is product.outputs[0])
    if gate is None or residual is None or residual.shape != y.shape or not is_row_of(gate, y):
        return
    yield Tail(node, total.outputs[0], {"gate": gate, "residual": residual}, {})
