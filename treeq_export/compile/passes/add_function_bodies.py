"""Pass `AddFunctionBodies`: give every `treeq` op a model-local function of standard ONNX.

Rules:
1. Layers of one structure share one overload, named by it; the node is set to it.
2. A QLinear body unpacks the planes and then is the form of bodies/qlinear.py. It ends in
   DequantizeLinear + MatMul, which ONNX Runtime folds to INT8 weights and runs as integers.
3. A Monarch body is the batched form of bodies/monarch.py.
4. A FusedQLinear body is those two, and what is fused in standard operators. The functions of its
   QLinear and Monarch are added beside it and named by attributes of the node, for who cuts the
   linear out (runners/plain_layer.py). It does not call them: ONNX Runtime does not find overloads
   from inside of a function.

Runs last: optimizers inline model-local functions. A runtime with our kernels takes those instead.
"""

from collections.abc import Callable, Iterator

import onnx_ir as ir

from treeq_export.compile.bodies.functions import (
    BranchShapes,
    make_monarch_function,
    make_qlinear_function,
    monarch_overload,
    qlinear_overload,
)
from treeq_export.compile.bodies.fused import make_fused_function, read_form
from treeq_export.compile.graph.contract import RewritePass, refuse
from treeq_export.compile.graph.fused import BRANCH_L, BRANCH_R, FUSED
from treeq_export.compile.graph.match import input_of, static_shape
from treeq_export.compile.graph.signature import (
    DOMAIN,
    MONARCH,
    QLINEAR,
    QLinearSignature,
    nodes_of,
    read_signature,
)
from treeq_export.compile.passes.add_branch import ADDEND
from treeq_export.compile.passes.mark_plugins import is_marked
from treeq_export.runners.plain_layer import BRANCH_FUNCTION, LINEAR_FUNCTION


class AddFunctionBodies(RewritePass[ir.Node]):
    """Add the functions; every treeq node names an overload with a body.

    Args:
        half: Whether the nodes are plugins in a float16 body.
    """

    def __init__(self, *, half: bool) -> None:
        super().__init__()
        self._half = half

    def requires(self, model: ir.Model) -> None:
        """Check that nodes of a float16 body are marked as plugins."""
        nodes = [*nodes_of(model, QLINEAR), *nodes_of(model, MONARCH)] if self._half else []
        refuse((node for node in nodes if not is_marked(node)), "is no plugin.")

    def _find(self, model: ir.Model) -> Iterator[ir.Node]:
        for op_type in (QLINEAR, MONARCH, FUSED):
            for node in nodes_of(model, op_type):
                if node.op_identifier() not in model.functions:
                    yield node

    def _rewrite(self, model: ir.Model, found: ir.Node) -> None:
        if found.op_type == MONARCH:
            found.overload = self._add_monarch(model, found, (1, 2))
            return
        signature = read_signature(found)
        if found.op_type == QLINEAR:
            found.overload = self._add_qlinear(model, signature, input_of(found, ADDEND))
            return
        linear = self._add_qlinear(model, signature, None)
        found.attributes.add(ir.AttrString(LINEAR_FUNCTION, linear))
        shapes = None
        if input_of(found, BRANCH_R) is not None:
            branch = self._add_monarch(model, found, (BRANCH_R, BRANCH_L))
            found.attributes.add(ir.AttrString(BRANCH_FUNCTION, branch))
            shapes = _shapes(found, (BRANCH_R, BRANCH_L))
        form = read_form(found, signature, shapes)
        found.overload = form.overload
        _add(model, FUSED, form.overload, lambda: make_fused_function(form))

    def _add_qlinear(
        self, model: ir.Model, signature: QLinearSignature, addend: ir.Value | None
    ) -> str:
        has_addend = addend is not None
        overload = qlinear_overload(signature, has_addend=has_addend)
        _add(
            model,
            QLINEAR,
            overload,
            lambda: make_qlinear_function(signature, half=self._half, has_addend=has_addend),
        )
        return overload

    def _add_monarch(self, model: ir.Model, node: ir.Node, factors: tuple[int, int]) -> str:
        shapes = _shapes(node, factors)
        overload = monarch_overload(shapes)
        _add(model, MONARCH, overload, lambda: make_monarch_function(shapes, half=self._half))
        return overload


def _shapes(node: ir.Node, factors: tuple[int, int]) -> BranchShapes:
    return static_shape(node.inputs[factors[0]]), static_shape(node.inputs[factors[1]])


def _add(model: ir.Model, op_type: str, overload: str, make: Callable[[], ir.Function]) -> None:
    if (DOMAIN, op_type, overload) not in model.functions:
        function = make()
        model.functions[function.identifier()] = function
