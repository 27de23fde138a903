"""The tree of the search: leaves of layers that share an input, merged pairwise, block by block.

A leaf is one linear, or the linears of a block that read the same input (q, k, v). Neighbouring
nodes are merged pairwise, bottom up: first inside each block until one node covers it, then blocks.
So a node lies inside one block or covers whole blocks, and a tree of n leaves has n - 1 merges.

A configuration of a node is one (weight bits, activation bits) pair per leaf, None where the leaf
stays in full precision; as text "3/4 2/3 -". A plan of floating-point activations has None in the
place of their bits; no search measures such a pair.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from treeq_export.model.layers import LinearInfo

Pair = tuple[int, int | None]
LeafConfiguration = Pair | None
Configuration = tuple[LeafConfiguration, ...]


@dataclass(frozen=True)
class Leaf:
    """Layers that get the same formats.

    Attributes:
        index: Number of the leaf in execution order, 0 at the first searched one.
        block: Number of its block in the network.
        linears: The layers.
    """

    index: int
    block: int
    linears: tuple[LinearInfo, ...]

    @property
    def num_weights(self) -> int:
        """Number of its quantized weights."""
        return sum(linear.in_features * linear.out_features for linear in self.linears)

    @property
    def name(self) -> str:
        """Block and positions, such as "0: attn1.to_q attn1.to_k"."""
        return f"{self.block}: {' '.join(linear.position for linear in self.linears)}"


@dataclass(frozen=True)
class Node:
    """A run of consecutive leaves; two children, or none where it is a leaf.

    Attributes:
        first: First leaf.
        last: Last leaf.
        first_block: Block of the first leaf.
        last_block: Block of the last leaf.
        children: The two nodes that it merges; empty for a leaf.
    """

    first: int
    last: int
    first_block: int
    last_block: int
    children: tuple["Node", ...] = ()

    @property
    def name(self) -> str:
        """Name in the journal, such as "segment 4..7"."""
        return f"segment {self.first}..{self.last}"

    @property
    def num_leaves(self) -> int:
        """Number of leaves."""
        return self.last - self.first + 1


def make_leaves(linears: Sequence[LinearInfo]) -> list[Leaf]:
    """Group layers by the input that they share, and number the leaves from 0.

    Args:
        linears: Layers in execution order; layers that are excluded from the search may be missing.

    Returns:
        The leaves in execution order, each inside one block.
    """
    groups: dict[int, list[LinearInfo]] = {}
    for linear in linears:
        groups.setdefault(linear.leaf, []).append(linear)
    return [
        Leaf(index, group[0].block, tuple(group))
        for index, group in enumerate(groups[leaf] for leaf in sorted(groups))
    ]


def build_tree(leaves: Sequence[Leaf]) -> Node:
    """Merge neighbours pairwise, first inside each block, then the blocks.

    Args:
        leaves: All leaves, in execution order.

    Returns:
        The root.
    """
    by_block: dict[int, list[Node]] = {}
    for leaf in leaves:
        node = Node(leaf.index, leaf.index, leaf.block, leaf.block)
        by_block.setdefault(leaf.block, []).append(node)
    return _merge_all([_merge_all(nodes) for nodes in by_block.values()])


def _merge_all(nodes: list[Node]) -> Node:
    while len(nodes) > 1:
        merged = [
            Node(left.first, right.last, left.first_block, right.last_block, (left, right))
            for left, right in zip(nodes[::2], nodes[1::2], strict=False)
        ]
        nodes = merged + nodes[2 * len(merged) :]
    return nodes[0]


def merge_levels(root: Node) -> list[list[Node]]:
    """Return the merging nodes bottom up; those of one level do not depend on each other."""
    levels: dict[int, list[Node]] = {}

    def enter(node: Node) -> int:
        height = max((enter(child) + 1 for child in node.children), default=0)
        levels.setdefault(height, []).append(node)
        return height

    enter(root)
    return [levels[height] for height in sorted(levels) if height]


def walk(node: Node, depth: int = 0) -> Iterator[tuple[Node, int]]:
    """Yield every node with its depth, the root (depth 0) first."""
    yield node, depth
    for child in node.children:
        yield from walk(child, depth + 1)


def replace_at(configuration: Configuration, index: int, pair: LeafConfiguration) -> Configuration:
    """Return a configuration with another entry at one place.

    >>> replace_at(((2, 2), (3, 3)), 1, None)
    ((2, 2), None)
    """
    return (*configuration[:index], pair, *configuration[index + 1 :])


def encode(configuration: Configuration) -> str:
    """Return a configuration as text.

    >>> encode(((3, 4), None, (2, 8)))
    '3/4 - 2/8'
    """
    return " ".join("-" if pair is None else f"{pair[0]}/{pair[1]}" for pair in configuration)


def decode(text: str) -> Configuration:
    """Return the configuration of a text.

    >>> decode("3/4 - 2/8")
    ((3, 4), None, (2, 8))
    """
    return tuple(None if word == "-" else _pair(word) for word in text.split())


def _pair(word: str) -> tuple[int, int]:
    weight, _, activation = word.partition("/")
    return int(weight), int(activation)


def describe(node: Node, leaves: Sequence[Leaf]) -> str:
    """Return a node's name for people: a leaf's layers, one block, or a range of blocks."""
    if not node.children:
        return leaves[node.first].name
    if node.first_block != node.last_block:
        return f"blocks {node.first_block}..{node.last_block}"
    inside = [leaf for leaf in leaves if leaf.block == node.first_block]
    if node.num_leaves == len(inside):
        return f"block {node.first_block}"
    first, last = leaves[node.first], leaves[node.last]
    return f"{node.first_block}: {first.linears[0].position} .. {last.linears[-1].position}"
