"""The network as a search sees it: made once, and sent to every worker as it is."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from treeq_export.errors import RecipeError
from treeq_export.model.layers import LinearInfo
from treeq_export.model.replay import block_names
from treeq_export.quant.spec import BranchFormat
from treeq_export.search.tree import Leaf, Node, build_tree, make_leaves


@dataclass(frozen=True)
class Network:
    """The layers that a search assigns, and their place in the network.

    Attributes:
        linears: The searched layers, in execution order.
        leaves: The same layers, grouped by the input that they share.
        root: The tree of the leaves.
        blocks: Module names of all blocks, searched or not, in execution order.
        branches: Branch shape by layer; a layer without a branch is missing.
    """

    linears: tuple[LinearInfo, ...]
    leaves: tuple[Leaf, ...]
    root: Node
    blocks: tuple[str, ...]
    branches: Mapping[str, BranchFormat] = field(default_factory=dict[str, BranchFormat])


def make_network(found: Sequence[LinearInfo], exclude: Sequence[str] = ()) -> Network:
    """Return the network of the layers that no glob pattern excludes, without branches.

    Args:
        found: All layers that can be quantized, in execution order; at least one.
        exclude: Glob patterns of layer names (`search.exclude`).

    Raises:
        RecipeError: A pattern matches nothing, or nothing is left.
    """
    linears = select_linears(found, exclude)
    leaves = make_leaves(linears)
    return Network(tuple(linears), tuple(leaves), build_tree(leaves), tuple(block_names(found)))


def select_linears(linears: Sequence[LinearInfo], exclude: Sequence[str]) -> list[LinearInfo]:
    """Return the layers that no glob pattern excludes.

    Raises:
        RecipeError: A pattern matches nothing, or nothing is left.
    """
    excluded: set[str] = set()
    for pattern in exclude:
        matched = {x.name for x in linears if fnmatch.fnmatchcase(x.name, pattern)}
        if not matched:
            raise RecipeError(
                f"search.exclude: {pattern!r} matches none of {len(linears)} layers, "
                f"such as {linears[0].name}. Correct or remove the pattern."
            )
        excluded |= matched
    selected = [linear for linear in linears if linear.name not in excluded]
    if not selected:
        raise RecipeError("search.exclude: leaves no layer to quantize. Remove a pattern.")
    return selected
