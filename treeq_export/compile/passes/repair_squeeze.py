"""Pass `RepairSqueeze`: drop the axes of a Squeeze that are not 1.

Rules:
1. Squeeze(x, axes) where the shape of x is known and some of the axes have an extent other than 1
   leaves those axes as they are in PyTorch and is an error in ONNX; they are dropped from `axes`.
2. Where no axis is left, the node becomes an Identity: its output may be a graph output, or the
   recorded input of a layer, and keeps its name.

The exporter writes it for PixArt's caption embedding, `hidden_states.squeeze(1)` on
(batch, tokens, width).
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from treeq_export.compile.graph.contract import RewritePass
from treeq_export.compile.graph.rewrite import add_initializer


class RepairSqueeze(RewritePass[ir.Node]):
    """Repair illegal Squeeze nodes; each one left drops axes of extent 1."""

    def _find(self, model: ir.Model) -> Iterator[ir.Node]:
        for node in model.graph:
            if node.op_type == "Squeeze" and not node.domain and len(node.inputs) > 1:
                given, legal = _axes(node)
                if legal != given:
                    yield node

    def _rewrite(self, model: ir.Model, found: ir.Node) -> None:
        _, legal = _axes(found)
        if not legal:
            found.op_type = "Identity"
            found.resize_inputs(1)
            return
        name = f"{found.outputs[0].name}/axes"
        axes = add_initializer(model.graph, name, np.array(legal, dtype=np.int64))
        found.replace_input_with(1, axes)


def _axes(node: ir.Node) -> tuple[list[int], list[int]]:
    """Return the axes of a Squeeze, and those that may stay; none where nothing is known."""
    source, axes = node.inputs[0], node.inputs[1]
    stored = None if axes is None else ir.convenience.get_const_tensor(axes)
    if source is None or source.shape is None or stored is None:
        return [], []
    shape, given = source.shape, [int(axis) for axis in stored.numpy().reshape(-1)]
    return given, [axis for axis in given if shape[axis] == 1 or shape.is_dynamic(axis)]
