"""What the structure of a quantized layer depends on, read off its `treeq::QLinear` node."""

from dataclasses import dataclass

import onnx_ir as ir

from treeq_export.errors import CompileError
from treeq_export.runners.plain_layer import DOMAIN as DOMAIN
from treeq_export.runners.plain_layer import MONARCH as MONARCH
from treeq_export.runners.plain_layer import QLINEAR as QLINEAR


@dataclass(frozen=True)
class QLinearSignature:
    """Attributes and shapes of one `treeq::QLinear`; layers with equal ones share a function body.

    Attributes:
        weight_bits: 2..8.
        act_bits: 2..8, 0 where the activation is not quantized.
        act_scale: "token_rms", "token_absmax", "tensor_static" or "none".
        act_step: The layer's activation step.
        rotation_group: Power of two dividing in_features.
        group_size: Input channels per weight scale; 0 is one scale per output channel.
        in_features: K.
        out_features: N.
        rank: Number of axes of x.
        has_bias: Whether there is a fourth input.
    """

    weight_bits: int
    act_bits: int
    act_scale: str
    act_step: float
    rotation_group: int
    group_size: int
    in_features: int
    out_features: int
    rank: int
    has_bias: bool

    @property
    def num_groups(self) -> int:
        """Weight scales per output channel."""
        return self.in_features // self.group_size if self.group_size else 1

    @property
    def overload(self) -> str:
        """Name of the function overload with this structure."""
        activation = f"a{self.act_bits}_{self.act_scale}" if self.act_bits else "float"
        parts = [
            f"w{self.weight_bits}",
            activation,
            f"h{self.rotation_group}",
            f"g{self.group_size}" if self.group_size else "channel",
            f"k{self.in_features}",
            f"rank{self.rank}",
        ]
        if self.act_bits:
            parts.append(self.act_step.hex().replace(".", "_").replace("+", ""))
        return "_".join(parts if self.has_bias else [*parts, "nobias"])


def layer_name(node: ir.Node) -> str:
    """Return the layer's name as in the checkpoint, from the name of its planes or R."""
    value = node.inputs[1]
    assert value is not None
    assert value.name is not None
    name = value.name.removeprefix("model.")
    return name.removesuffix(".planes").removesuffix(".branch.R")


def read_signature(node: ir.Node) -> QLinearSignature:
    """Return the signature of a `treeq::QLinear` node.

    Raises:
        CompileError: The shape of x is not known.
    """
    x, planes = node.inputs[0], node.inputs[1]
    assert planes is not None
    in_features = None if x is None or x.shape is None else x.shape[-1]
    if x is None or x.shape is None or not isinstance(in_features, int):
        raise CompileError(f"{layer_name(node)}: the exported graph does not say the shape of x.")
    attributes = node.attributes
    return QLinearSignature(
        weight_bits=attributes["weight_bits"].as_int(),
        act_bits=attributes["act_bits"].as_int(),
        act_scale=attributes["act_scale"].as_string(),
        act_step=attributes["act_step"].as_float(),
        rotation_group=attributes["rotation_group"].as_int(),
        group_size=attributes["group_size"].as_int(),
        in_features=in_features,
        out_features=attributes["out_features"].as_int(),
        rank=len(x.shape),
        has_bias=len(node.inputs) > 3 and node.inputs[3] is not None,
    )


def nodes_of(model: ir.Model, op_type: str) -> list[ir.Node]:
    """Return the graph's nodes `treeq::<op_type>` in order."""
    return [node for node in model.graph if node.domain == DOMAIN and node.op_type == op_type]
