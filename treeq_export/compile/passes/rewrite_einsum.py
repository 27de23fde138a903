"""Pass `RewriteEinsum`: an Einsum that only permutes axes becomes a Transpose.

Rules:
1. One operand, every index once on each side, such as the unpatchify "nhwpqc->nchpwq": Transpose.
2. Everything else stays: TensorRT contracts up to two operands in a layer of its own.
"""

from collections.abc import Iterator

import onnx_ir as ir

from treeq_export.compile.graph.contract import RewritePass

Found = tuple[ir.Node, list[int]]


class RewriteEinsum(RewritePass[Found]):
    """Rewrite permutations; each Einsum left contracts something."""

    def _find(self, model: ir.Model) -> Iterator[Found]:
        for node in model.graph:
            if node.op_type == "Einsum" and not node.domain and len(node.inputs) == 1:
                perm = _permutation(node.attributes["equation"].as_string())
                if perm is not None:
                    yield node, perm

    def _rewrite(self, model: ir.Model, found: Found) -> None:
        node, perm = found
        node.op_type = "Transpose"
        node.attributes.clear()
        node.attributes.add(ir.AttrInt64s("perm", perm))


def _permutation(equation: str) -> list[int] | None:
    source, arrow, target = equation.replace(" ", "").partition("->")
    if not arrow or "." in source or len(set(source)) != len(source):
        return None
    if sorted(source) != sorted(target):
        return None
    return [source.index(axis) for axis in target]
