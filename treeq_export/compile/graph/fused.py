"""`treeq::FusedQLinear`: a quantized linear with what surrounds it in a Diffusion Transformer.

    x' = LayerNormalization(x) * (1 + norm_scale) + norm_shift
    y  = activation(QLinear(x') + Monarch(x'))
    y  = residual + gate * y
    y, y2, y3 = the output channels in equal parts

Everything but the QLinear may be left out. The passes fuse_*.py and merge_siblings.py build it step
by step, each with `widen`; kernels/ort runs it, bodies/form.py says it in standard operators.
"""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from treeq_export import ops
from treeq_export.compile.graph.rewrite import replace_values
from treeq_export.compile.graph.signature import DOMAIN, QLINEAR
from treeq_export.runners.plain_layer import input_of

FUSED = ops.FUSED.name
MAX_OUTPUTS = ops.FUSED.num_outputs


def packed_nodes(model: ir.Model) -> list[ir.Node]:
    """Return the graph's QLinear and FusedQLinear nodes in order."""
    return [n for n in model.graph if n.domain == DOMAIN and n.op_type in (QLINEAR, FUSED)]


def activation_of(node: ir.Node) -> str:
    """Return "gelu_tanh" or "none"."""
    return node.attributes["activation"].as_string() if node.op_type == FUSED else "none"


def hides_input(node: ir.Node) -> bool:
    """Whether what a node's linear reads is computed inside of the node, and no value."""
    return input_of(node, "norm_scale") is not None


def hides_output(node: ir.Node) -> bool:
    """Whether what a node's linear writes is used inside of the node, and no value."""
    return input_of(node, "gate") is not None or activation_of(node) != "none"


def widen(
    graph: ir.Graph,
    node: ir.Node,
    inputs: Mapping[str, ir.Value | None],
    outputs: list[ir.Value],
    at: ir.Node | None = None,
    **attributes: Any,
) -> ir.Node:
    """Put a FusedQLinear in the place of a packed node.

    Args:
        graph: Holds the node.
        node: A QLinear or FusedQLinear; it is removed.
        inputs: Inputs to set, by name; the others stay.
        outputs: The values that the new node computes from now on; they keep name, type and shape,
            and what only they needed is removed.
        at: Before which node the new one goes; None is the producer of the last output, because
            everything that the new node reads is computed there.
        **attributes: Attributes to set; the others stay.

    Returns:
        The new node.
    """
    wide = [inputs.get(name, input_of(node, name)) for name in ops.FUSED.inputs]
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
