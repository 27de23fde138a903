"""Strategy `uniform`: the same formats for every layer. The baseline of every other strategy."""

from collections.abc import Mapping, Sequence

from treeq_export.model.layers import LinearInfo
from treeq_export.plan import LayerPlan
from treeq_export.quant.spec import BranchFormat
from treeq_export.recipe import SearchSection
from treeq_export.search.budget import CostModel
from treeq_export.search.formats import assign, make_layer_plan
from treeq_export.search.strategies.greedy import uniform_configuration
from treeq_export.search.tree import make_leaves


def assign_uniform(
    linears: Sequence[LinearInfo], section: SearchSection, branches: Mapping[str, BranchFormat]
) -> tuple[LayerPlan, ...]:
    """Return the same formats for every layer, or two neighbouring widths at a fractional budget.

    Args:
        linears: The layers in execution order.
        section: Bits, or a budget.
        branches: Branch shape by layer; a layer without one is missing.

    Raises:
        FormatError: A group, rotation or branch does not fit a layer.
        RecipeError: The budget cannot be met.
    """
    if section.budget is None:
        return tuple(
            make_layer_plan(
                linear,
                section,
                section.weight_bits,
                section.activation_bits,
                branches.get(linear.name),
            )
            for linear in linears
        )
    leaves = make_leaves(linears)
    costs = CostModel(leaves, section, dict(branches))
    return assign(leaves, uniform_configuration(leaves, costs, section), section, branches)
