"""The list of quantized layers in a model's metadata, kept true through all passes."""

import onnx_ir as ir
from onnx_ir.passes import PassError

from treeq_export.compile.graph.fused import hides_input, hides_output, packed_nodes
from treeq_export.runners.graph_meta import LayerSite, read_layers, write_layers


def follow_layers(model: ir.Model) -> None:
    """Bring the list of layers up to date.

    Rules:
    1. A value that became part of a fused node has no name any more.
    2. An input value that is gone was replaced by the one that the layer's node reads.
    3. An output value keeps its name, whoever computes it.

    Raises:
        PassError: A layer or its output value is lost, or a node has no layer.
    """
    sites = read_layers(model)
    if not sites:
        return
    nodes = {node.name: node for node in packed_nodes(model)}
    values = ir.convenience.create_value_mapping(model.graph)
    followed = [_follow(site, nodes.get(site.node), values) for site in sites]
    strangers = nodes.keys() - {site.node for site in sites}
    if strangers:
        raise PassError(f"{', '.join(map(str, strangers))}: belongs to no layer.")
    if followed != sites:
        write_layers(model, followed)


def _follow(site: LayerSite, node: ir.Node | None, values: dict[str, ir.Value]) -> LayerSite:
    if node is not None:
        x = node.inputs[0]
        if hides_input(node):
            site = site._replace(input="")
        elif site.input not in values and x is not None and x.name is not None:
            site = site._replace(input=x.name)
        if hides_output(node):
            site = site._replace(output="")
    for value in (site.input, site.output):
        if value and value not in values:
            raise PassError(f"{site.name}: its value {value} is gone.")
    return site
