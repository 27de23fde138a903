"""From bits to entries of a plan."""

from treeq_export.model.layers import LinearInfo
from treeq_export.ops import ActScale
from treeq_export.plan import LayerPlan, TreePath
from treeq_export.quant.rotation import largest_group
from treeq_export.quant.spec import ActivationFormat, BranchFormat, WeightFormat
from treeq_export.recipe import SearchSection
from treeq_export.search.network import Network
from treeq_export.search.tree import Configuration, Pair


def candidate_pairs(section: SearchSection) -> list[Pair]:
    """Return a leaf's candidates, ascending in weight bits, then activation bits."""
    return [
        (weight, activation)
        for weight in sorted(set(section.weight_candidates))
        for activation in sorted(set(section.activation_candidates))
    ]


def make_activation_format(section: SearchSection, bits: int | None) -> ActivationFormat:
    """Return the activation format for the recipe's words.

    Args:
        section: Grid, and kind of activation scale; "auto" goes by the bits.
        bits: 2..8, or None to keep activations in floating point.
    """
    if bits is None:
        return ActivationFormat(bits=None, scale=ActScale.NONE)
    scale = section.activation_scale
    chosen = ActScale.for_bits(bits) if scale == "auto" else ActScale(scale)
    return ActivationFormat(bits=bits, scale=chosen, grid=section.activation_grid)


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
        section: Grids, group size, rotation group and kind of activation scale.
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
        weight=WeightFormat(
            bits=weight_bits, group_size=section.group_size, grid=section.weight_grid
        ),
        activation=make_activation_format(section, activation_bits),
        rotation_group=largest_group(linear.in_features) if group == "auto" else group,
        branch=branch,
    )
    layer.check_shapes()
    return layer


def assign(
    network: Network, configuration: Configuration, section: SearchSection
) -> tuple[LayerPlan, ...]:
    """Return the plan's entries of a configuration of the whole network, in execution order.

    Args:
        network: The searched layers and their branches.
        configuration: One pair of bits per leaf.
        section: Group size, rotation group and kind of activation scale.

    Raises:
        FormatError: A group, rotation or branch does not fit a layer.
    """
    pairs = {
        linear.name: pair
        for leaf, pair in zip(network.leaves, configuration, strict=True)
        for linear in leaf.linears
    }
    return tuple(
        make_layer_plan(linear, section, *pair, network.branches.get(linear.name))
        for linear in network.linears
        if (pair := pairs[linear.name]) is not None
    )


def make_templates(network: Network, section: SearchSection) -> tuple[LayerPlan, ...]:
    """Return one entry per layer whose bits are placeholders: the least candidates.

    Raises:
        FormatError: A group, rotation or branch does not fit a layer.
    """
    least = min(section.weight_candidates), min(section.activation_candidates)
    return assign(network, (least,) * len(network.leaves), section)
