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
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from treeq_export.compile.passes.fuse_attention import swapped_source
from treeq_export.compile.passes.fuse_modulate import producer_of

_SWAP = [0, 1, 3, 2]


class MergeTransposes(InPlacePass):
    """Merge transposes; ensures that no Transpose reads a Transpose's output."""

    def call(self, model: ir.Model) -> PassResult:
        """Change the graph in place."""
        modified = False
        for node in model.graph:
            if node.op_type == "Reshape" and not node.domain:
                modified |= _merge_swap(model.graph, node)
        for node in model.graph:
            if node.op_type == "Transpose" and not node.domain:
                modified |= _compose(node)
        RemoveUnusedNodesPass()(model)
        return PassResult(model, modified)


def permutation_of(node: ir.Node) -> list[int]:
    """Return a Transpose's permutation."""
    return list(node.attributes["perm"].as_ints())


def _merge_swap(graph: ir.Graph, reshape: ir.Node) -> bool:
    old = reshape.outputs[0]
    source = swapped_source(old)
    if source is None or source.shape is None or len(source.shape) != len(_SWAP):
        return False
    turned = ir.node("Transpose", [source], attributes={"perm": _SWAP}, name=f"{old.name}/swap")
    new, name = turned.outputs[0], old.name
    new.type = old.type
    new.shape = ir.Shape([source.shape[axis] for axis in _SWAP])
    graph.insert_before(reshape, turned)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name, new.name = f"{name}/unused", name
    return True


def _compose(node: ir.Node) -> bool:
    first = producer_of(node.inputs[0], "Transpose")
    modified = first is not None
    if first is not None:
        inner = permutation_of(first)
        perm = [inner[axis] for axis in permutation_of(node)]
        node.replace_input_with(0, first.inputs[0])
        node.attributes.add(ir.AttrInt64s("perm", perm))
    output, source = node.outputs[0], node.inputs[0]
    assert source is not None
    if permutation_of(node) == sorted(permutation_of(node)) and not output.is_graph_output():
        ir.convenience.replace_all_uses_with(output, source)
        modified = True
    return modified
