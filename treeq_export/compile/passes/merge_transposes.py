"""Pass `MergeTransposes`: one Transpose where the exporter writes several in a row.

Rules:
1. Reshape, Transpose [0, 2, 1], Reshape over merged leading axes, which is how the exporter swaps
   the last two axes of k in an attention, becomes Transpose [0, 1, 3, 2].
2. A Transpose of a Transpose becomes one with the composed permutation; the first stays for its
   other readers.
3. A Transpose that moves nothing is left out, unless its output is a graph output.

So k of an attention is turned once, without shape arithmetic in between.
"""

import onnx_ir as ir
from onnx_ir.passes import PassResult

from treeq_export.compile.graph.contract import LayerPass, refuse
from treeq_export.compile.graph.match import SWAP, permutation_of, producer_of, swapped_source
from treeq_export.compile.graph.rewrite import remove_unread, replace_node


class MergeTransposes(LayerPass):
    """Merge transposes."""

    def call(self, model: ir.Model) -> PassResult:
        """Change the graph in place."""
        swaps = [_merge_swap(model.graph, node) for node in _nodes(model, "Reshape")]
        composed = [_compose(model.graph, node) for node in _nodes(model, "Transpose")]
        return PassResult(model, any(swaps) or any(composed))

    def ensures(self, model: ir.Model) -> None:
        """Check that no Transpose reads a Transpose's output."""
        left = (n for n in _nodes(model, "Transpose") if producer_of(n.inputs[0], "Transpose"))
        refuse(left, "reads another Transpose.")


def _nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type and not node.domain]


def _merge_swap(graph: ir.Graph, reshape: ir.Node) -> bool:
    old = reshape.outputs[0]
    source = swapped_source(old)
    if source is None or source.shape is None or len(source.shape) != len(SWAP):
        return False
    turned = ir.node("Transpose", [source], attributes={"perm": SWAP}, name=f"{old.name}/swap")
    shape = ir.Shape([source.shape[axis] for axis in SWAP])
    replace_node(graph, old, [turned])
    turned.outputs[0].shape = shape
    return True


def _compose(graph: ir.Graph, node: ir.Node) -> bool:
    output = node.outputs[0]
    perm = permutation_of(output)
    first = producer_of(node.inputs[0], "Transpose")
    inner = permutation_of(node.inputs[0])
    if first is not None and inner is not None and perm is not None:
        perm = [inner[axis] for axis in perm]
        node.replace_input_with(0, first.inputs[0])
        node.attributes.add(ir.AttrInt64s("perm", perm))
        remove_unread(graph, [first])
    source = node.inputs[0]
    if perm != sorted(perm or []) or source is None or output.is_graph_output():
        return first is not None
    ir.convenience.replace_all_uses_with(output, source)
    remove_unread(graph, [node])
    return True
