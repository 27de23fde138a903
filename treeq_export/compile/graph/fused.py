"""`treeq::FusedQLinear`: a quantized linear with what surrounds it in a Diffusion Transformer.

    x' = LayerNormalization(x) * (1 + norm_scale) + norm_shift
    y  = activation(QLinear(x') + Monarch(x'))
    y  = residual + gate * y
    y, y2, y3 = the output channels in equal parts

Everything but the QLinear may be left out. The passes fuse_*.py and merge_siblings.py build it step
by step, each with `widen`; kernels/ort runs it, fused_body.py says it in standard operators.
"""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from treeq_export import ops
from treeq_export.compile.graph.match import input_of
from treeq_export.compile.graph.rewrite import replace_values
from treeq_export.compile.graph.signature import DOMAIN, QLINEAR

FUSED = ops.FUSED.name
MAX_OUTPUTS = ops.FUSED.num_outputs
# Inputs by position.
X, PLANES, WEIGHT_SCALE, BIAS, BRANCH_R, BRANCH_L = range(6)
NORM_SCALE, NORM_SHIFT, GATE, RESIDUAL = range(6, 10)
INPUTS = (
    "x",
    "planes",
    "weight_scale",
    "bias",
    "branch_R",
    "branch_L",
    "norm_scale",
    "norm_shift",
    "gate",
    "residual",
)


def packed_nodes(model: ir.Model) -> list[ir.Node]:
    """Return the graph's QLinear and FusedQLinear nodes in order."""
    return [n for n in model.graph if n.domain == DOMAIN and n.op_type in (QLINEAR, FUSED)]


def activation_of(node: ir.Node) -> str:
    """Return "gelu_tanh" or "none"."""
    return node.attributes["activation"].as_string() if node.op_type == FUSED else "none"


def hides_input(node: ir.Node) -> bool:
    """Whether what a node's linear reads is computed inside of the node, and no value."""
    return node.op_type == FUSED and input_of(node, NORM_SCALE) is not None


def hides_output(node: ir.Node) -> bool:
    """Whether what a node's linear writes is used inside of the node, and no value."""
    is_gated = node.op_type == FUSED and input_of(node, GATE) is not None
    return is_gated or activation_of(node) != "none"


def widen(
    graph: ir.Graph,
    node: ir.Node,
    inputs: Mapping[int, ir.Value | None],
    outputs: list[ir.Value],
    at: ir.Node | None = None,
    **attributes: Any,
) -> ir.Node:
    """Put a FusedQLinear in the place of a packed node.

    Args:
        graph: Holds the node.
        node: A QLinear or FusedQLinear; it is removed.
        inputs: Inputs to set, by position; the others stay.
        outputs: The values that the new node computes from now on; they keep name, type and shape,
            and what only they needed is removed.
        at: Before which node the new one goes; None is the producer of the last output, because
            everything that the new node reads is computed there.
        **attributes: Attributes to set; the others stay.

    Returns:
        The new node.
    """
    wide = [input_of(node, position) for position in range(len(INPUTS))]
    for position, value in inputs.items():
        wide[position] = value
    while wide[-1] is None:
        wide.pop()
    kept: dict[str, Any] = {"activation": "none", "norm_epsilon": 0.0}
    kept |= {name: attribute.value for name, attribute in node.attributes.items()}
    fused = ir.node(
        FUSED,
        wide,
        attributes=kept | attributes,
        domain=DOMAIN,
        version=1,
        num_outputs=len(outputs),
        name=node.name,
    )
    place = at or outputs[-1].producer() or node
    replace_values(graph, place, [fused], outputs, fused.outputs)
    return fused
