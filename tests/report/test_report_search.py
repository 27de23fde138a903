"""Tree, front, training curve and branch table."""

from xml.etree import ElementTree

import pytest

from treeq_export.records import FinetuneRecord, SearchNode, SearchRecord
from treeq_export.report.branches import tabulate_branches
from treeq_export.report.search_figures import choose_axis, draw_front, draw_training
from treeq_export.report.tree import WIDTH, draw_tree, mix_color


def texts_of(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter("text")]


class TestTree:
    def test_a_box_is_as_wide_as_its_leaves_and_as_deep_as_its_depth(
        self, search: SearchRecord
    ) -> None:
        boxes = list(ElementTree.fromstring(draw_tree(search.nodes)).iter("rect"))
        assert len(boxes) == 2 * len(search.nodes)
        place = [(float(b.attrib["x"]), float(b.attrib["y"])) for b in boxes[::2]]
        width = [float(b.attrib["width"]) for b in boxes[::2]]
        assert width == pytest.approx([WIDTH - 1.5, WIDTH / 2 - 1.5, WIDTH / 2 - 1.5])
        assert place[1][0] == place[0][0]
        assert place[2][0] == pytest.approx(place[1][0] + WIDTH / 2)
        assert place[0][1] < place[1][1] == place[2][1]

    def test_halves_say_and_show_the_chosen_bits(self, search: SearchRecord) -> None:
        svg = draw_tree(search.nodes)
        assert texts_of(svg)[:2] == ["blocks 0..1  W 3.25", "A 4.00"]
        styles = [r.attrib["style"] for r in ElementTree.fromstring(svg).iter("rect")]
        assert styles[0] == f"fill: {mix_color(3.25)}"
        assert styles[4] == "fill: var(--bits-8)"
        titles = [e.text for e in ElementTree.fromstring(svg).iter("title")]
        assert titles[0] == (
            "blocks 0..1: weights 3.25 bits, activations 4.00 bits; 16 configurations kept"
        )

    def test_dark_boxes_have_light_text(self, search: SearchRecord) -> None:
        texts = list(ElementTree.fromstring(draw_tree(search.nodes)).iter("text"))
        inks = {e.text: e.attrib["style"] for e in texts}
        assert "high-ink" in inks["1: ff.up  W 8.00"]
        assert "low-ink" in inks["A 4.00"]

    @pytest.mark.parametrize(("num_leaves", "text"), [(12, "W 3.00"), (30, "3.0"), (400, None)])
    def test_text_is_as_long_as_a_box_allows(self, num_leaves: int, text: str | None) -> None:
        nodes = [
            SearchNode(
                name=f"{leaf}: a layer of a long name",
                depth=0,
                first_leaf=leaf,
                last_leaf=leaf,
                num_configurations=16,
                weight_bits=3.0,
                activation_bits=4.0,
            )
            for leaf in range(num_leaves)
        ]
        assert (texts_of(draw_tree(nodes)) or [None])[0] == text

    def test_names_are_escaped(self, search: SearchRecord) -> None:
        node = search.nodes[0].model_copy(update={"name": "<b>&"})
        assert "&lt;b&gt;&amp;" in draw_tree([node])

    def test_colours_stay_within_the_scale(self) -> None:
        assert mix_color(1.0) == "var(--bits-2)"
        assert mix_color(32.0) == "var(--bits-8)"
        assert mix_color(2.5) == "color-mix(in oklab, var(--bits-2) 50%, var(--bits-3))"


class TestFront:
    def test_shows_kept_dropped_chosen_and_budget(self, search: SearchRecord) -> None:
        texts = texts_of(draw_front(search))
        assert {"kept, 2", "dropped", "chosen", "budget"} <= set(texts)
        assert "average bits, mean of weights and activations" in texts

    def test_the_same_bytes_again(self, search: SearchRecord) -> None:
        assert draw_front(search) == draw_front(search)

    def test_without_a_budget_there_is_no_line(self, search: SearchRecord) -> None:
        assert "budget" not in texts_of(draw_front(search.model_copy(update={"budget": {}})))

    @pytest.mark.parametrize(
        ("budget", "label", "limit", "place"),
        [
            ({"weight_bits": 3.0}, "average weight bits", 3.0, 2.5),
            ({"activation_bits": 2.0}, "average activation bits", 2.0, 4.0),
            ({"size_bytes": 2e6}, "megabytes of quantized layers", 2.0, 1.5),
            ({"weight_bits": 3.0, "activation_bits": 4.0, "size_bytes": 1.0}, None, 3.5, 3.25),
            ({}, None, None, 3.25),
        ],
    )
    def test_axis_shows_the_budget(
        self,
        search: SearchRecord,
        budget: dict[str, float],
        label: str | None,
        limit: float | None,
        place: float,
    ) -> None:
        axis = choose_axis(search.model_copy(update={"budget": budget}))
        changes = {"weight_bits": 2.5, "activation_bits": 4.0, "size_bytes": 1_500_000}
        point = search.front[0].model_copy(update=changes)
        assert axis.label == (label or "average bits, mean of weights and activations")
        assert (axis.limit, axis.place(point)) == (limit, place)


def test_training_curve(finetune: FinetuneRecord) -> None:
    texts = texts_of(draw_training(finetune))
    assert {"training loss", "held-out loss", "optimizer steps"} <= set(texts)


class TestBranches:
    def test_least_error_is_chosen_whatever_the_order(self) -> None:
        trials = [
            {"b_in": 1, "b_out": 1, "rank": 4, "num_parameters": 9, "error": 0.3},
            {"b_in": 2, "b_out": 4, "rank": 1, "num_parameters": 9, "error": 0.1},
            {"b_in": 2, "b_out": 2, "rank": 2, "num_parameters": 9, "error": 0.2},
            {"b_in": 4, "b_out": 4, "rank": 1, "num_parameters": 9, "error": 0.15},
        ]
        table = tabulate_branches({"a": trials, "b": trials[:1], "c": []})
        first, second = table.choices
        assert (first.layer, first.chosen, first.error) == ("a", "4x2 r1", 0.1)
        assert (first.low_rank, first.square, first.num_tried) == (0.3, 0.15, 4)
        assert (second.chosen, second.low_rank, second.square) == ("1x1 r4", 0.3, None)
        assert table.shapes == (("1x1", 1), ("4x2", 1))
        assert table.num_better == 1

    def test_nothing_was_tried(self) -> None:
        assert tabulate_branches({}).choices == ()
