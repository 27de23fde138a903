"""Pass `MarkPlugins`: `treeq` nodes become what the TensorRT plugins of the same name read.

Rules:
1. Every `treeq` node carries plugin_namespace and plugin_version: without them TensorRT's parser
   imports the function body and says nothing.
2. A QLinear without bias gets zeros, float32, shared by all layers of one width, so that the
   addend always is the fifth input of a plugin.
3. A group_size of all input channels is one scale per channel and becomes 0.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from treeq_export.compile.graph.signature import DOMAIN, QLINEAR
from treeq_export.compile.passes.lower_qlinear import add_initializer
from treeq_export.ops import PLUGIN_ATTRIBUTES

_BIAS = 3


class MarkPlugins(InPlacePass):
    """Mark the nodes; ensures that every treeq node is one that a plugin accepts."""

    def call(self, model: ir.Model) -> PassResult:
        """Change the graph in place."""
        nodes = [node for node in model.graph if node.domain == DOMAIN]
        for node in nodes:
            for name, value in PLUGIN_ATTRIBUTES.items():
                node.attributes.add(ir.AttrString(name, value))
            if node.op_type == QLINEAR:
                _complete(model.graph, node)
        return PassResult(model, bool(nodes))


def _complete(graph: ir.Graph, node: ir.Node) -> None:
    attributes = node.attributes
    if attributes["group_size"].as_int() == attributes["in_features"].as_int():
        attributes.add(ir.AttrInt64("group_size", 0))
    if len(node.inputs) <= _BIAS:
        node.resize_inputs(_BIAS + 1)
    if node.inputs[_BIAS] is None:
        n = attributes["out_features"].as_int()
        zeros = add_initializer(graph, f"treeq.zero_bias_{n}", np.zeros(n, np.float32))
        node.replace_input_with(_BIAS, zeros)
