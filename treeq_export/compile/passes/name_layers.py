"""Pass `NameLayers`: name every quantized layer and write down where it begins and ends.

Rules:
1. A `treeq::QLinear` node takes its layer's name.
2. The layer's output is the node's output; where the only consumer adds the layer's Monarch
   branch, it is the sum. That value is named `<layer>.output`.
3. The list of layers goes into the model's metadata as `treeq.layers`, JSON, in graph order:
   name, input value, output value, node. Later passes keep these names, or say what became of them.
"""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from treeq_export.compile.graph.signature import DOMAIN, MONARCH, QLINEAR, layer_name, nodes_of
from treeq_export.runners.graph_meta import LayerSite, write_layers


class NameLayers(InPlacePass):
    """Name the layers; ensures that `graph_meta.read_layers` finds them."""

    def call(self, model: ir.Model) -> PassResult:
        """Change the model in place."""
        outputs = set(model.graph.outputs)
        layers = []
        for node in nodes_of(model, QLINEAR):
            name = layer_name(node)
            node.name = name
            output = _layer_output(node)
            if output not in outputs:
                output.name = f"{name}.output"
            source = node.inputs[0]
            assert source is not None
            assert source.name is not None
            assert output.name is not None
            layers.append(LayerSite(name, source.name, output.name, node=name))
        write_layers(model, layers)
        return PassResult(model, bool(layers))


def _layer_output(node: ir.Node) -> ir.Value:
    """Return the node's output, or the sum with its branch."""
    output = node.outputs[0]
    consumers = [use.node for use in output.uses()]
    if len(consumers) != 1 or consumers[0].op_type != "Add":
        return output
    for other in consumers[0].inputs:
        producer = None if other is None else other.producer()
        if (
            producer is not None
            and (producer.domain, producer.op_type) == (DOMAIN, MONARCH)
            and layer_name(producer) == layer_name(node)
        ):
            producer.name = f"{layer_name(node)}/branch"
            return consumers[0].outputs[0]
    return output
