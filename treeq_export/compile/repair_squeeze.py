"""Pass `RepairSqueeze`: remove a Squeeze of an axis that is not 1.

Rule:
1. Squeeze(x, axes) where the shape of x is known and one of the axes has an extent other than 1
   is an identity in PyTorch and an error in ONNX; its output is replaced by x. The exporter writes
   it for PixArt's caption embedding, `hidden_states.squeeze(1)` on (batch, tokens, width).
"""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult


class RepairSqueeze(InPlacePass):
    """Remove illegal Squeeze nodes; ensures that each one left drops axes of extent 1."""

    def call(self, model: ir.Model) -> PassResult:
        """Change the model in place."""
        illegal = [node for node in model.graph if _is_illegal(node)]
        for node in illegal:
            source = node.inputs[0]
            assert source is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
            model.graph.remove(node, safe=True)
        return PassResult(model, bool(illegal))


def _is_illegal(node: ir.Node) -> bool:
    if node.op_type != "Squeeze" or node.domain or len(node.inputs) < 2:
        return False
    source, axes = node.inputs
    if source is None or source.shape is None or axes is None:
        return False
    tensor = ir.convenience.get_const_tensor(axes)
    if tensor is None:
        return False
    dims = [source.shape[int(axis)] for axis in tensor.numpy().reshape(-1)]
    return any(isinstance(dim, int) and dim != 1 for dim in dims)
