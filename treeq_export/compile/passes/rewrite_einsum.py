"""Pass `RewriteEinsum`: an Einsum that only permutes axes becomes a Transpose.

Rules:
1. One operand, every index once on each side, such as the unpatchify "nhwpqc->nchpwq": Transpose.
2. Everything else stays: TensorRT contracts up to two operands in a layer of its own.
"""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult


class RewriteEinsum(InPlacePass):
    """Rewrite permutations; ensures that each Einsum left contracts something."""

    def call(self, model: ir.Model) -> PassResult:
        """Change the graph in place."""
        modified = False
        for node in model.graph:
            perm = _permutation(node)
            if perm is not None:
                node.op_type = "Transpose"
                node.attributes.clear()
                node.attributes.add(ir.AttrInt64s("perm", perm))
                modified = True
        return PassResult(model, modified)


def _permutation(node: ir.Node) -> list[int] | None:
    if node.op_type != "Einsum" or node.domain or len(node.inputs) != 1:
        return None
    source, arrow, target = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    if not arrow or "." in source or len(set(source)) != len(source):
        return None
    if sorted(source) != sorted(target):
        return None
    return [source.index(axis) for axis in target]
