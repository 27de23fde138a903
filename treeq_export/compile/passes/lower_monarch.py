"""Pass `LowerMonarch`: `treeq::Monarch` to standard ONNX.

Rules:
1. A 1 x 1 grid (plain low rank) is two MatMuls with the factors squeezed to matrices.
2. Any other grid is two batched MatMuls, the blocks as batch:
   x -> (b_in, M, K/b_in) @ R -> (b_out, M, b_in*r) @ L -> (..., N).
"""

from collections.abc import Iterator

import onnx_ir as ir

from treeq_export.compile.bodies.monarch import write_monarch
from treeq_export.compile.bodies.writer import BodyWriter
from treeq_export.compile.graph.contract import RewritePass
from treeq_export.compile.graph.rewrite import add_initializer, initializer_array, replace_node
from treeq_export.compile.graph.signature import MONARCH, layer_name, nodes_of


class LowerMonarch(RewritePass[ir.Node]):
    """Rewrite every `treeq::Monarch` of the graph; none is left."""

    def _find(self, model: ir.Model) -> Iterator[ir.Node]:
        yield from nodes_of(model, MONARCH)

    def _rewrite(self, model: ir.Model, found: ir.Node) -> None:
        graph, name = model.graph, layer_name(found)
        x, r_value, l_value = found.inputs
        assert x is not None
        assert r_value is not None
        assert l_value is not None
        r_factor, l_factor = initializer_array(r_value), initializer_array(l_value)
        writer = BodyWriter(f"{name}/branch/")
        if len(r_factor) == 1 and len(l_factor) == 1:
            r_value = add_initializer(graph, f"{name}.branch.R_matrix", r_factor[0])
            z = writer.op("MatMul", x, r_value)
            l_value = add_initializer(graph, f"{name}.branch.L_matrix", l_factor[0])
            writer.op("MatMul", z, l_value)
        else:
            write_monarch(writer, x, r_value, l_value, r_factor.shape, l_factor.shape)
        replace_node(graph, found.outputs[0], writer.tape.nodes)
