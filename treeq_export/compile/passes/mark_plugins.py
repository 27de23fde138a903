"""Pass `MarkPlugins`: `treeq` nodes become what the TensorRT plugins of the same name read.

Rules:
1. Every `treeq` node carries plugin_namespace and plugin_version: without them TensorRT's parser
   imports the function body and says nothing.
2. A QLinear without bias gets zeros, float32, shared by all layers of one width, so that the
   addend always is the fifth input of a plugin.
3. A group_size of all input channels is one scale per channel and becomes 0.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from treeq_export.compile.graph.contract import RewritePass
from treeq_export.compile.graph.rewrite import add_initializer
from treeq_export.compile.graph.signature import DOMAIN, QLINEAR
from treeq_export.ops import PLUGIN_ATTRIBUTES
from treeq_export.runners.plain_layer import input_of

_BIAS = 3


class MarkPlugins(RewritePass[ir.Node]):
    """Mark the nodes; every treeq node is one that a plugin accepts."""

    def _find(self, model: ir.Model) -> Iterator[ir.Node]:
        for node in model.graph:
            if node.domain == DOMAIN and not (is_marked(node) and _is_complete(node)):
                yield node

    def _rewrite(self, model: ir.Model, found: ir.Node) -> None:
        attributes = found.attributes
        for name, value in PLUGIN_ATTRIBUTES.items():
            attributes.add(ir.AttrString(name, value))
        if found.op_type != QLINEAR:
            return
        if _is_one_group(found):
            attributes.add(ir.AttrInt64("group_size", 0))
        if len(found.inputs) <= _BIAS:
            found.resize_inputs(_BIAS + 1)
        if found.inputs[_BIAS] is None:
            n = attributes["out_features"].as_int()
            zeros = np.zeros(n, np.float32)
            bias = add_initializer(model.graph, f"treeq.zero_bias_{n}", zeros)
            found.replace_input_with(_BIAS, bias)


def is_marked(node: ir.Node) -> bool:
    """Whether TensorRT takes its plugin for a node."""
    read = node.attributes.get_string
    return all(read(name, "") == value for name, value in PLUGIN_ATTRIBUTES.items())


def _is_complete(node: ir.Node) -> bool:
    is_layer = node.op_type == QLINEAR
    return not is_layer or (input_of(node, "bias") is not None and not _is_one_group(node))


def _is_one_group(node: ir.Node) -> bool:
    attributes = node.attributes
    return attributes["group_size"].as_int() == attributes["in_features"].as_int()
