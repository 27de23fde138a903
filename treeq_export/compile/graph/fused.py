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
from treeq_export.compile.graph.signature import DOMAIN, QLINEAR
from treeq_export.runners.graph_meta import read_layers, write_layers

FUSED = ops.FUSED.name
MAX_OUTPUTS = 3
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


def is_packed(node: ir.Node | None) -> bool:
    """Whether a node is a `treeq::QLinear` or a `treeq::FusedQLinear`."""
    return node is not None and node.domain == DOMAIN and node.op_type in (QLINEAR, FUSED)


def packed_nodes(model: ir.Model) -> list[ir.Node]:
    """Return the graph's QLinear and FusedQLinear nodes in order."""
    return [node for node in model.graph if is_packed(node)]


def input_of(node: ir.Node, position: int) -> ir.Value | None:
    """Return an input by position, None where it is left out."""
    return node.inputs[position] if position < len(node.inputs) else None


def activation_of(node: ir.Node) -> str:
    """Return "gelu_tanh" or "none"."""
    return node.attributes["activation"].as_string() if node.op_type == FUSED else "none"


def only_user(value: ir.Value) -> ir.Node | None:
    """Return the one node that reads a value; None where there are more, or it is an output."""
    users = {use.node for use in value.uses()}
    return users.pop() if len(users) == 1 and not value.is_graph_output() else None


def constant_of(value: ir.Value | None) -> Any:
    """Return the array of an initializer or Constant, None where the value is computed."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


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
        node: A QLinear or FusedQLinear; it has no readers afterwards.
        inputs: Inputs to set, by position; the others stay.
        outputs: The values that the new node computes from now on; their producers are removed by
            RemoveUnusedNodes, and they keep name, type and shape.
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
    names = [value.name for value in outputs]
    for old, new in zip(outputs, fused.outputs, strict=True):
        new.type, new.shape = old.type, old.shape
    graph.insert_before(place, fused)
    ir.convenience.replace_all_uses_with(outputs, list(fused.outputs), replace_graph_outputs=True)
    for value, name in zip(fused.outputs, names, strict=True):
        value.name = name
    return fused


def forget_values(model: ir.Model, names: set[str | None], **value: str) -> None:
    """Let sites say that a value of theirs became part of a fused node.

    Args:
        model: Holds the sites.
        names: Of the fused nodes.
        **value: input="" or output="".
    """
    sites = read_layers(model)
    write_layers(model, [site._replace(**value) if site.node in names else site for site in sites])
