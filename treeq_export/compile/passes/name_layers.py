"""Pass `NameLayers`: name every quantized layer and write down where it begins and ends.

Rules:
1. A `treeq::QLinear` node takes its layer's name.
2. The layer's output is the node's output; where the only consumer adds the layer's Monarch
   branch, it is the sum. That value is named `<layer>.output`.
3. The list of layers goes into the model's metadata as `treeq.layers`, JSON, in graph order:
   name, input value, output value, node. It is kept true from then on (graph/contract.py).
"""

import onnx_ir as ir
from onnx_ir.passes import PassResult

from treeq_export.compile.graph.contract import LayerPass, refuse
from treeq_export.compile.graph.match import find_branches
from treeq_export.compile.graph.signature import QLINEAR, layer_name, nodes_of
from treeq_export.compile.graph.sites import LayerSite, read_layers, write_layers


class NameLayers(LayerPass):
    """Name the layers."""

    def call(self, model: ir.Model) -> PassResult:
        """Change the model in place."""
        branched = {found.layer: found for found in find_branches(model)}
        layers = []
        for node in nodes_of(model, QLINEAR):
            node.name = layer_name(node)
            output = node.outputs[0]
            found = branched.get(node)
            if found is not None and layer_name(found.monarch) == node.name:
                found.monarch.name = f"{node.name}/branch"
                output = found.total
            if not output.is_graph_output():
                output.name = f"{node.name}.output"
            source = node.inputs[0]
            assert source is not None
            layers.append(
                LayerSite(node.name, source.name or "", output.name or "", node=node.name)
            )
        write_layers(model, layers)
        return PassResult(model, bool(layers))

    def ensures(self, model: ir.Model) -> None:
        """Check that the list has every layer, with both of its values."""
        whole = {site.node for site in read_layers(model) if site.input and site.output}
        refuse((n for n in nodes_of(model, QLINEAR) if n.name not in whole), "is not listed.")
