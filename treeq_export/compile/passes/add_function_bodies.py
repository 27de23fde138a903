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

from collections.abc import Iterator

import onnx_ir as ir

from treeq_export.compile.bodies.form import Form, make_function, read_form
from treeq_export.compile.graph.contract import RewritePass, refuse
from treeq_export.compile.graph.signature import nodes_of
from treeq_export.compile.passes.mark_plugins import is_marked
from treeq_export.ops import DOMAIN, FUSED, MONARCH, QLINEAR


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
        nodes = [node for node in model.graph if self._half and node.domain == DOMAIN]
        refuse((node for node in nodes if not is_marked(node)), "is no plugin.")

    def _find(self, model: ir.Model) -> Iterator[ir.Node]:
        for op in (QLINEAR, MONARCH, FUSED):
            for node in nodes_of(model, op.name):
                if node.op_identifier() not in model.functions:
                    yield node

    def _rewrite(self, model: ir.Model, found: ir.Node) -> None:
        form = read_form(found, half=self._half)
        for attribute, part in form.parts.items():
            _add(model, part)
            found.attributes.add(ir.AttrString(attribute, part.overload))
        _add(model, form)
        found.overload = form.overload


def _add(model: ir.Model, form: Form) -> None:
    key = (DOMAIN, form.op.name, form.overload)
    if key not in model.functions:
        model.functions[key] = make_function(form)
