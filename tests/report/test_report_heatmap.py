from treeq_export.plan import Plan
from treeq_export.report.heatmap import HeatMap, describe_layer, lay_out_bits


def bits_of(heatmap: HeatMap) -> dict[str, list[list[str]]]:
    return {
        position: [[f"{cell.weight}/{cell.activation}" for cell in cells] for cells in places]
        for position, places in heatmap.rows
    }


def test_heatmap_puts_layers_by_position_and_block_and_leaves_holes(plan: Plan) -> None:
    heatmap = lay_out_bits(plan)
    assert heatmap.blocks == (0, 1)
    assert bits_of(heatmap) == {"attn.to_q": [["3/4"], []], "ff.up": [["4/5"], ["8/fp"]]}
    assert heatmap.weights == (("3", 1), ("4", 1), ("8", 1))
    assert heatmap.activations == (("4", 1), ("5", 1), ("fp", 1))


def test_heatmap_marks_branches(plan: Plan) -> None:
    _, (first, second) = lay_out_bits(plan).rows[1]
    assert not first[0].has_branch
    assert second[0].has_branch


def test_heatmap_keeps_layers_that_share_a_place(plan: Plan) -> None:
    doubled = plan.model_copy(update={"layers": (*plan.layers, plan.layers[0])})
    assert bits_of(lay_out_bits(doubled))["attn.to_q"] == [["3/4", "3/4"], []]


def test_heatmap_skips_blocks_without_layers(plan: Plan) -> None:
    tree = plan.layers[2].tree.model_copy(update={"block": 9})
    moved = plan.layers[2].model_copy(update={"tree": tree})
    layers = (*plan.layers[:2], moved)
    assert lay_out_bits(plan.model_copy(update={"layers": layers})).blocks == (0, 9)


def test_description_says_formats_and_branch(plan: Plan) -> None:
    assert describe_layer(plan.layers[0]) == (
        "blocks.0.attn.to_q: 8 → 16; weight 3 bit; activation 4 bit, token_rms"
    )
    grouped = plan.layers[2].model_copy(
        update={
            "weight": plan.layers[2].weight.model_copy(update={"group_size": 4}),
            "rotation_group": 8,
        }
    )
    assert describe_layer(grouped) == (
        "blocks.1.ff.up: 8 → 16; weight 8 bit per group of 4; activation in floating point; "
        "Hadamard group 8; branch 1x1 blocks of rank 2"
    )
