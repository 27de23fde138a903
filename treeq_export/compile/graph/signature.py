"""What the structure of a quantized layer depends on, read off its `treeq::QLinear` node."""

from dataclasses import dataclass

import onnx_ir as ir

from treeq_export import ops
from treeq_export.errors import CompileError
from treeq_export.ops import LayerFormat
from treeq_export.quant.grids import ACT_GRID, INTEGER, WEIGHT_GRID, Grid, find_grid
from treeq_export.runners.plain_layer import input_of, read_format

DOMAIN, MONARCH, QLINEAR = ops.DOMAIN, ops.MONARCH.name, ops.QLINEAR.name


@dataclass(frozen=True)
class QLinearSignature(LayerFormat):
    """A layer's format and what else its function body depends on; layers of equal ones share it.

    Attributes:
        rank: Number of axes of x.
        has_bias: Whether the node has a bias.
        weight_grid: Grid of the weight's levels.
        act_grid: Grid of the activation's levels.
    """

    rank: int
    has_bias: bool
    weight_grid: Grid = INTEGER
    act_grid: Grid = INTEGER

    @property
    def fits_int4(self) -> bool:
        """Whether every level of the weight is an INT4."""
        least, largest = self.weight_grid.ends(self.weight_bits)
        return least >= -8 and largest <= 7

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
    x = input_of(node, "x")
    if x is None or x.shape is None or not isinstance(x.shape[-1], int):
        raise CompileError(f"{layer_name(node)}: the exported graph does not say the shape of x.")
    return QLinearSignature(
        **vars(read_format(node)),
        rank=len(x.shape),
        has_bias=input_of(node, "bias") is not None,
        weight_grid=find_grid(node.attributes.get_string(WEIGHT_GRID, INTEGER.name)),
        act_grid=find_grid(node.attributes.get_string(ACT_GRID, INTEGER.name)),
    )


def nodes_of(model: ir.Model, op_type: str) -> list[ir.Node]:
    """Return the graph's nodes `treeq::<op_type>` in order."""
    return [node for node in model.graph if node.domain == DOMAIN and node.op_type == op_type]
