import math
import re
from collections.abc import Callable
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from treeq_export.records import BenchRow, LayerParity, ParityRecord, TargetParity
from treeq_export.report.figures import draw_parity, draw_sizes, draw_speed

MakeParity = Callable[..., ParityRecord]
BLOCKS = {"blocks.0.attn.to_q": 0, "blocks.0.ff.up": 0, "blocks.1.ff.up": 1}


def texts_of(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter("text")]


def uses_of(svg: str, color: str) -> int:
    """Count the markers drawn in a colour of the page."""
    return sum(
        color in element.get("style", "") for element in ElementTree.fromstring(svg).iter("use")
    )


def make_target(values: list[float]) -> TargetParity:
    layers = [
        LayerParity(
            name=f"blocks.{number // 7}.layer{number}",
            sqnr_db=value,
            max_abs_error=0.0,
            equal_code_fraction=None,
            accumulators_equal=None,
            propagated_sqnr_db=50.0,
            quantization_sqnr_db=15.0,
        )
        for number, value in enumerate(values)
    ]
    return TargetParity(
        target="ort", passed=True, sqnr_db=50.0, max_abs_error=0.0, layers=layers, gates=[]
    )


def test_drawing_is_deterministic_and_leaves_matplotlib_as_it_was(make_parity: MakeParity) -> None:
    before = dict(mpl.rcParams)
    first = draw_parity(make_parity().targets, BLOCKS, 40.0)
    assert draw_parity(make_parity().targets, BLOCKS, 40.0) == first
    assert dict(mpl.rcParams) == before


def test_drawing_ignores_the_reader_s_own_settings(make_parity: MakeParity) -> None:
    plain = draw_parity(make_parity().targets, BLOCKS, 40.0)
    with mpl.rc_context({"font.size": 30.0, "axes.facecolor": "red"}):
        assert draw_parity(make_parity().targets, BLOCKS, 40.0) == plain


def test_drawings_follow_the_page_and_do_not_share_ids(make_parity: MakeParity) -> None:
    drawings = [
        draw_parity(make_parity().targets, BLOCKS, 40.0),
        draw_speed([BenchRow(target="ort", batch=2, median_ms=2.0, all_times_ms=[2.0])], ["ort"]),
        draw_sizes([("ort", 800), ("fp32", 4200)], 4200),
    ]
    seen: set[str] = set()
    for svg in drawings:
        root = ElementTree.fromstring(svg)
        assert root.tag == "svg"
        assert set(root.attrib) == {"viewBox", "role"}
        ids = {element.attrib["id"] for element in root.iter() if "id" in element.attrib}
        links = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
        assert links
        assert links <= ids
        assert not seen & ids
        seen |= ids
        assert "var(--ink)" in svg
        assert "#0101" not in svg
        assert "metadata" not in svg


def test_parity_draws_infinity_at_a_labelled_level() -> None:
    svg = draw_parity([make_target([math.inf, 90.0])], {}, 40.0)
    assert "inf: bit-exact" in texts_of(svg)
    assert "nan, -inf" not in texts_of(svg)
    assert "inf: bit-exact" not in texts_of(draw_parity([make_target([95.0, 90.0])], {}, 40.0))


def test_parity_draws_nan_and_minus_infinity_at_a_labelled_level() -> None:
    texts = texts_of(draw_parity([make_target([math.nan, -math.inf, 90.0])], {}, 40.0))
    assert "nan, -inf" in texts
    assert "inf: bit-exact" not in texts


def test_parity_marks_layers_below_the_gate() -> None:
    alarm = "var(--bad)"
    passing = draw_parity([make_target([95.0, 90.0])], {}, 40.0)
    failing = draw_parity([make_target([35.0, 30.0])], {}, 40.0)
    assert uses_of(passing, alarm) == 0
    assert uses_of(failing, alarm) == 2
    assert "gate on own error, 40 dB" in texts_of(failing)


def test_parity_without_a_finite_gate_draws_none() -> None:
    texts = texts_of(draw_parity([make_target([math.inf])], {}, -math.inf))
    assert not [text for text in texts if text.startswith("gate")]


@pytest.mark.parametrize("num_layers", [2, 399])
def test_parity_labels_blocks_for_few_and_many_layers(num_layers: int) -> None:
    target = make_target([90.0] * num_layers)
    blocks = {layer.name: number // 7 for number, layer in enumerate(target.layers)}
    texts = texts_of(draw_parity([target], blocks, 40.0))
    last = (num_layers - 1) // 7
    assert "0" in texts
    assert str(last - last % 2) in texts
    assert texts.count("layers in execution order, by block") == 1


def test_speed_draws_every_round_and_says_what_lies_beyond_the_axis() -> None:
    rows = [
        BenchRow(target="ort_fp32", batch=2, median_ms=6.0, all_times_ms=[6.0, 6.1, 5.9]),
        BenchRow(target="ort", batch=2, median_ms=4.0, all_times_ms=[4.0, 3.9, 123.0, 4.1]),
    ]
    svg = draw_speed(rows, ["ort"])
    texts = texts_of(svg)
    assert "6 ms" in texts
    assert "4 ms  (1 beyond the axis, up to 123 ms)" in texts
    assert "batch 2" in texts
    assert uses_of(svg, "var(--ink)") == 6
    assert uses_of(svg, "var(--bad)") == 1
    bars = [e.get("style", "") for e in ElementTree.fromstring(svg).iter("path")]
    assert sum("fill: var(--series-1)" in style for style in bars) == 1
    assert sum("fill: var(--series-0)" in style for style in bars) == 1


def test_speed_has_a_panel_per_batch() -> None:
    rows = [
        BenchRow(target="ort", batch=batch, median_ms=4.0, all_times_ms=[4.0]) for batch in (2, 8)
    ]
    texts = texts_of(draw_speed(rows, ["ort"]))
    assert [text for text in texts if text.startswith("batch")] == ["batch 2", "batch 8"]


def test_sizes_claim_smaller_only_where_it_is() -> None:
    texts = texts_of(draw_sizes([("ort", 800), ("grown", 5000), ("fp32", 4200)], 4200))
    assert "800 B  (5.25x smaller)" in texts
    assert "5 kB" in texts
    assert "4.2 kB" in texts


def test_names_are_drawn_literally() -> None:
    row = BenchRow(target="<b>$x$", batch=2, median_ms=4.0, all_times_ms=[4.0])
    svg = draw_speed([row], [])
    assert "<b>$x$" in texts_of(svg)
    assert "&lt;b&gt;$x$" in svg
