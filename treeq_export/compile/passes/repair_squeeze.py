"""Pass `RepairSqueeze`: drop the axes of a Squeeze that are not 1.

Rules:
1. Squeeze(x, axes) where the shape of x is known and some of the axes have an extent other than 1
   leaves those axes as they are in PyTorch and is an error in ONNX; they are dropped from `axes`.
2. Where no axis is left, the node becomes an Identity: its output may be a graph output, or the
   recorded input of a layer, and keeps its name.

The exporter writes it for PixArt's caption embedding, `hidden_states.squeeze(1)` on
(batch, tokens, width).
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult


class RepairSqueeze(InPlacePass):
    """Repair illegal Squeeze nodes; ensures that each one left drops axes of extent 1."""

    def call(self, model: ir.Model) -> PassResult:
        """Change the model in place."""
        modified = False
        for node in model.graph:
            legal = _legal_axes(node)
            if legal is not None:
                _repair(model.graph, node, legal)
                modified = True
        return PassResult(model, modified)


def _legal_axes(node: ir.Node) -> list[int] | None:
    """Return the axes that may stay; None where the node is no illegal Squeeze."""
    if node.op_type != "Squeeze" or node.domain or len(node.inputs) < 2:
        return None
    source, axes = node.inputs
    if source is None or source.shape is None or axes is None:
        return None
    tensor = ir.convenience.get_const_tensor(axes)
    if tensor is None:
        return None
    given = [int(axis) for axis in tensor.numpy().reshape(-1)]
    legal = [axis for axis in given if source.shape[axis] == 1 or source.shape.is_dynamic(axis)]
    return legal if len(legal) < len(given) else None


def _repair(graph: ir.Graph, node: ir.Node, legal: list[int]) -> None:
    if not legal:
        node.op_type = "Identity"
        node.resize_inputs(1)
        return
    tensor = ir.tensor(np.array(legal, dtype=np.int64))
    axes = ir.val(f"{node.outputs[0].name}/axes", const_value=tensor)
    graph.register_initializer(axes)
    node.replace_input_with(1, axes)
