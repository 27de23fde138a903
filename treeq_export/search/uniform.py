"""Strategy `uniform`: the same formats for every layer. The baseline of every other strategy."""

from treeq_export.model.layers import LinearInfo
from treeq_export.plan import LayerPlan, TreePath
from treeq_export.quant.spec import ActivationFormat, ActivationScale, WeightFormat
from treeq_export.recipe import SearchSection

# From this width on, a token's largest value costs less than the tails of the sigma step.
ABSMAX_FROM_BITS = 7


def make_activation_format(bits: int | None, scale: str) -> ActivationFormat:
    """Return the activation format for the recipe's words.

    Args:
        bits: 2..8, or None to keep activations in floating point.
        scale: "auto", "token_rms", "token_absmax" or "tensor_static".
    """
    if bits is None:
        return ActivationFormat(bits=None, scale="none")
    chosen: ActivationScale = "token_absmax" if bits >= ABSMAX_FROM_BITS else "token_rms"
    if scale in ("token_rms", "token_absmax", "tensor_static"):
        chosen = scale
    return ActivationFormat(bits=bits, scale=chosen)


def make_layer_plan(linear: LinearInfo, section: SearchSection) -> LayerPlan:
    """Return one layer's entry with the recipe's formats.

    Raises:
        FormatError: A group, rotation or branch does not fit the layer.
    """
    layer = LayerPlan(
        name=linear.name,
        in_features=linear.in_features,
        out_features=linear.out_features,
        tree=TreePath(block=linear.block, position=linear.position, leaf=linear.leaf),
        weight=WeightFormat(bits=section.weight_bits, group_size=section.group_size),
        activation=make_activation_format(section.activation_bits, section.activation_scale),
        rotation_group=section.rotation_group,
        branch=section.branch,
    )
    layer.check_shapes()
    return layer


def assign_uniform(linears: list[LinearInfo], section: SearchSection) -> tuple[LayerPlan, ...]:
    """Return the same formats for every layer, in execution order."""
    return tuple(make_layer_plan(linear, section) for linear in linears)
