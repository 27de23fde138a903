"""From bits to entries of a plan."""

from collections.abc import Mapping, Sequence

from treeq_export.model.layers import LinearInfo
from treeq_export.ops import ActScale
from treeq_export.plan import LayerPlan, TreePath
from treeq_export.quant.rotation import largest_group
from treeq_export.quant.spec import ActivationFormat, BranchFormat, WeightFormat
from treeq_export.recipe import SearchSection
from treeq_export.search.tree import Configuration, Leaf

Pair = tuple[int, int]  # weight bits, activation bits


def candidate_pairs(section: SearchSection) -> list[Pair]:
    """Return a leaf's candidates, ascending in weight bits, then activation bits."""
    return [
        (weight, activation)
        for weight in sorted(set(section.weight_candidates))
        for activation in sorted(set(section.activation_candidates))
    ]


def make_activation_format(bits: int | None, scale: str) -> ActivationFormat:
    """Return the activation format for the recipe's words.

    Args:
        bits: 2..8, or None to keep activations in floating point.
        scale: "auto", which goes by the bits, or the name of an `ActScale`.
    """
    if bits is None:
        return ActivationFormat(bits=None, scale=ActScale.NONE)
    chosen = ActScale.for_bits(bits) if scale == "auto" else ActScale(scale)
    return ActivationFormat(bits=bits, scale=chosen)


def make_layer_plan(
    linear: LinearInfo,
    section: SearchSection,
    weight_bits: int,
    activation_bits: int | None,
    branch: BranchFormat | None,
) -> LayerPlan:
    """Return one layer's entry, checked.

    Args:
        linear: The layer.
        section: Group size, rotation group and kind of activation scale.
        weight_bits: 2..8.
        activation_bits: 2..8, or None to keep activations in floating point.
        branch: Shape of its branch.

    Raises:
        FormatError: A group, rotation or branch does not fit the layer.
    """
    group = section.rotation_group
    layer = LayerPlan(
        name=linear.name,
        in_features=linear.in_features,
        out_features=linear.out_features,
        tree=TreePath(block=linear.block, position=linear.position, leaf=linear.leaf),
        weight=WeightFormat(bits=weight_bits, group_size=section.group_size),
        activation=make_activation_format(activation_bits, section.activation_scale),
        rotation_group=largest_group(linear.in_features) if group == "auto" else group,
        branch=branch,
    )
    layer.check_shapes()
    return layer


def assign(
    leaves: Sequence[Leaf],
    configuration: Configuration,
    section: SearchSection,
    branches: Mapping[str, BranchFormat],
) -> tuple[LayerPlan, ...]:
    """Return the plan's entries of a configuration of the whole network, in execution order.

    Args:
        leaves: All leaves.
        configuration: One pair of bits per leaf.
        section: Group size, rotation group and kind of activation scale.
        branches: Branch shape by layer; a layer without one is missing.
    """
    layers = [
        make_layer_plan(linear, section, pair[0], pair[1], branches.get(linear.name))
        for leaf, pair in zip(leaves, configuration, strict=True)
        if pair is not None
        for linear in leaf.linears
    ]
    return tuple(layers)
