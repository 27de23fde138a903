"""The tree: its shape, its order of merges, its names, and what a search of it costs."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from treeq_export.search.estimate import count_cost
from treeq_export.search.network import Network
from treeq_export.search.network import make_network as network_of
from treeq_export.search.tree import (
    Node,
    build_tree,
    decode,
    describe,
    encode,
    make_leaves,
    merge_levels,
    walk,
)

MakeNetwork = Callable[..., Network]


def test_layers_of_one_input_are_one_leaf(make_network: MakeNetwork):
    leaves = make_network(2).leaves
    assert len(leaves) == 10
    assert [x.position for x in leaves[6].linears] == ["to_q", "to_k", "to_v"]
    assert leaves[6].num_weights == 3 * 64
    assert [leaf.index for leaf in leaves] == list(range(10))
    assert [leaf.block for leaf in leaves] == [0] * 5 + [1] * 5


def test_leaves_are_numbered_from_zero_where_layers_are_excluded(make_network: MakeNetwork):
    leaves = make_network(4).leaves
    rest = [x for leaf in leaves if leaf.block >= 2 for x in leaf.linears if x.position != "fc1"]
    found = make_leaves(rest)
    assert [leaf.index for leaf in found] == list(range(8))
    assert [leaf.block for leaf in found] == [2] * 4 + [3] * 4


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5, 6, 28])
def test_every_merge_is_inside_a_block_or_of_whole_blocks(
    num_blocks: int, make_network: MakeNetwork
):
    leaves = make_network(num_blocks).leaves
    root = build_tree(leaves)
    assert (root.first, root.last) == (0, len(leaves) - 1)
    merges = [node for node, _ in walk(root) if node.children]
    assert len(merges) == len(leaves) - 1
    for node in merges:
        left, right = node.children
        assert (left.first, right.last) == (node.first, node.last)
        assert left.last + 1 == right.first
        assert node.first_block == left.first_block
        assert node.last_block == right.last_block
        whole = node.first % 5 == 0 and node.last % 5 == 4
        assert whole or node.first_block == node.last_block
        if node.first_block != node.last_block:
            assert left.last % 5 == 4


def test_levels_come_bottom_up(make_network: MakeNetwork):
    root = make_network(6).root
    done: set[Node] = set()
    for level in merge_levels(root):
        for node in level:
            assert all(child in done or not child.children for child in node.children)
        done |= set(level)
    assert root in done
    assert [len(level) for level in merge_levels(root)] == [12, 6, 6, 3, 1, 1]


def test_depths_count_from_the_root(make_network: MakeNetwork):
    depths = {node.name: depth for node, depth in walk(make_network(2).root)}
    assert depths["segment 0..9"] == 0
    assert depths["segment 0..4"] == 1
    assert depths["segment 4..4"] == 2
    assert depths["segment 0..0"] == 4


def test_a_single_leaf_is_its_own_tree(make_network: MakeNetwork):
    network = network_of(make_network(1).leaves[0].linears)
    root = network.root
    assert root.children == ()
    assert merge_levels(root) == []
    assert count_cost(network, 16, 16).num_evaluations == 17


def test_names_for_people(make_network: MakeNetwork):
    leaves = make_network(3).leaves
    names = {node.name: describe(node, leaves) for node, _ in walk(build_tree(leaves))}
    assert names["segment 0..14"] == "blocks 0..2"
    assert names["segment 5..9"] == "block 1"
    assert names["segment 5..6"] == "1: norm .. to_v"
    assert names["segment 6..6"] == "1: to_q to_k to_v"


def test_evaluations_are_linear_in_the_leaves(make_network: MakeNetwork):
    counts = {blocks: count_cost(make_network(blocks), 16, 16) for blocks in (2, 4, 6, 28)}
    for blocks, count in counts.items():
        assert count.num_leaves == 5 * blocks
        assert count.num_merges == 5 * blocks - 1
        assert count.num_evaluations == 256 * (5 * blocks - 1) + 17 * 5 * blocks
    assert [counts[blocks].num_evaluations for blocks in (2, 4, 6)] == [2474, 5204, 7934]


def test_block_runs_are_counted_by_hand(make_network: MakeNetwork):
    def runs(blocks: int) -> int:
        return count_cost(make_network(blocks), 16, 16).num_block_runs

    # 4 merges inside each block: 16 runs of the block on the left, 256 on the right. Two blocks:
    # 16 runs of the left one, 256 of the right one. 5 leaves of each block: 16 candidates alone
    # run the block, another one the network from the block on.
    assert runs(1) == 5 * 17 + 4 * 272
    assert runs(2) == 5 * 18 + 5 * 17 + 2 * 4 * 272 + 272
    # Blocks (0, 1) and 2: 2 runs per left configuration.
    assert runs(3) == 5 * 19 + 5 * 18 + 5 * 17 + 13 * 272 + 32 + 256
    # What lies behind the searched blocks runs as well.
    longer = replace(make_network(1), blocks=("",) * 4)
    assert count_cost(longer, 16, 16).num_block_runs == 5 * 20 + 4 * 272


def test_fewer_candidates_cost_less(make_network: MakeNetwork):
    # 4 candidates: 16 pairs at each of the lowest merges, then at most 8 of them are kept.
    cost = count_cost(make_network(1), 4, 8)
    assert cost.num_evaluations == 5 * 5 + 4 * 4 + 4 * 4 + 8 * 8 + 8 * 4


def test_configurations_as_text():
    configuration = ((3, 4), None, (2, 8))
    assert decode(encode(configuration)) == configuration
    assert decode("") == ()
    assert encode(()) == ""
