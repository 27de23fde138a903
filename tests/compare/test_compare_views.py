"""The views of a comparison: table, terminal, page and picture."""

import re
from collections.abc import Callable
from io import BytesIO, StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from rich.console import Console

from treeq_export.compare.figures import draw_png, draw_svg
from treeq_export.compare.html import render_comparison
from treeq_export.compare.progress import CompareProgress, Progress, describe_row
from treeq_export.compare.terminal import print_comparison
from treeq_export.compare.view import label_of, ratio_to_uniform, table_rows
from treeq_export.records import CompareRecord, CompareRow

MakeRow = Callable[..., CompareRow]


def texts_of(svg: str) -> set[str]:
    return {e.text or "" for e in ElementTree.fromstring(svg).iter("text")}


def print_text(record: CompareRecord, width: int = 140) -> str:
    console = Console(file=StringIO(), width=width, color_system=None)
    print_comparison(record, console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


class TestTable:
    def test_rows_by_budget_with_peers_last(self, comparison: CompareRecord) -> None:
        rows = table_rows(comparison)
        assert [row.texts["strategy"] for row in rows] == [
            "uniform",
            "tss",
            "integer_programming",
            "greedy",
            "tss + PEFT",
            "uniform",
            "tss",
            "integer_programming",
            "greedy",
            "modelopt_int8_max",
        ]
        assert [row.texts["strategy"] for row in rows if row.first] == ["uniform"] * 2 + [
            "modelopt_int8_max"
        ]

    def test_best_of_a_budget_trained_apart(self, comparison: CompareRecord) -> None:
        assert [row.row.name for row in table_rows(comparison) if row.best] == ["tss-3", "tss-4"]

    def test_ratio_to_uniform_bits_of_the_same_budget(self, comparison: CompareRecord) -> None:
        ratios = {row.name: ratio_to_uniform(comparison, row) for row in comparison.rows}
        assert ratios["tss-3"] == pytest.approx(0.5)
        assert ratios["tss-3-peft"] == pytest.approx(2.5e-3 / 8e-3)
        assert ratios["greedy-4"] == pytest.approx(0.75)
        assert ratios["uniform-3"] is None
        assert ratios["peer-modelopt_int8_max"] is None
        rows = [row for row in comparison.rows if row.strategy != "uniform"]
        alone = comparison.model_copy(update={"rows": rows})
        assert ratio_to_uniform(alone, rows[0]) is None

    def test_label(self, make_compare_row: MakeRow) -> None:
        assert label_of(make_compare_row("greedy", 3.0, variant="qat")) == "greedy + QAT"
        assert label_of(make_compare_row("ModelOpt", None, peer=True)) == "ModelOpt"

    def test_without_a_classifier(
        self, comparison: CompareRecord, make_compare_row: MakeRow
    ) -> None:
        fields = ("network_mse", "frechet_distance", "frechet_ratio", "class_accuracy")
        row = make_compare_row("tss", 3.0, **dict.fromkeys(fields))
        [shown] = table_rows(comparison.model_copy(update={"rows": [row]}))
        names = ("network_mse", "frechet_distance", "class_accuracy")
        texts = {shown.texts[name] for name in names}
        assert texts == {"-"}
        assert shown.texts["psnr_db"] == "31.0 ± 1.0"
        assert describe_row(row) == "W3.00 A3.00"


class TestTerminal:
    def test_table(self, comparison: CompareRecord) -> None:
        text = print_text(comparison)
        assert "100 images for each of 3 seeds; fake-quantized in PyTorch" in text
        [line] = [line for line in text.splitlines() if line.startswith(" tss + PEFT")]
        words = line.split()
        assert words[3:9] == ["3", "3.00", "/", "3.00", "8.7", "%"]
        assert words[9:11] == ["2.500e-03", "0.31x"]
        assert words[-5:] == ["2", "min", "10", "s", "1,234"]
        assert re.search(r"full precision +0\.333 ± 0\.090", text)
        assert "Still to come: greedy-3.5, tss-3.5" in text

    def test_one_seed_and_nothing_to_come(self, comparison: CompareRecord) -> None:
        text = print_text(comparison.model_copy(update={"seeds": [0], "pending": []}))
        assert "1 seed;" in text
        assert "Still to come" not in text

    def test_names_are_taken_literally(
        self, comparison: CompareRecord, make_compare_row: MakeRow
    ) -> None:
        odd = make_compare_row("[red]x[/red]", None, peer=True)
        assert "[red]x[/red]" in print_text(comparison.model_copy(update={"rows": [odd]}))


class TestProgress:
    @pytest.mark.parametrize("terminal", [True, False])
    def test_a_line_per_cell(self, make_compare_row: MakeRow, terminal: bool) -> None:
        stream = StringIO()
        console = Console(file=stream, width=120, force_terminal=terminal, color_system=None)
        row = make_compare_row("tss", 3.0)
        with CompareProgress(console) as progress:
            progress.start_stage("tss-3", "search")(0.5)
            progress.start_stage("tss-3", "calibrate")(1.0)
            progress.finish_cell(row, Progress(1, 3, worked=True, left_s=30.0))
            progress.finish_cell(row, Progress(2, 3, worked=False, left_s=None))
        text = stream.getvalue()
        scores = "network MSE 4.000e-03, Frechet 1.88x of full precision"
        assert f"[1/3] tss-3: W3.00 A3.00, {scores}, about 30.0 s left\n" in text
        assert "[2/3] tss-3: up to date\n" in text
        assert ("calibrate" in text) == terminal


class TestPicture:
    def test_page_colours_and_the_same_text_again(self, comparison: CompareRecord) -> None:
        svg = draw_svg(comparison)
        assert draw_svg(comparison) == svg
        assert "#0101" not in svg
        texts = texts_of(svg)
        labels = {"uniform", "tss", "tss + PEFT", "integer_programming", "greedy"}
        dots = {"kept at the root of tss", "dropped at the root of tss"}
        assert labels | dots <= texts
        assert "modelopt_int8_max, W8A8" in texts

    def test_png_is_in_the_light_theme_s_colours(self, comparison: CompareRecord) -> None:
        data = draw_png(comparison)
        assert draw_png(comparison) == data
        with Image.open(BytesIO(data)) as image:
            assert image.size == (1650, 705)
            colors = image.convert("RGB").getcolors(1 << 24) or []
        assert max(colors)[1] == (255, 255, 255)
        assert (0x1F, 0x5F, 0xBF) in {color for _, color in colors}
        assert (1, 1, 5) not in {color for _, color in colors}

    def test_peer_within_the_axis_stands_at_its_bits(
        self, comparison: CompareRecord, make_compare_row: MakeRow
    ) -> None:
        peer = make_compare_row(
            "SVDQuant", None, peer=True, weight_bits=4.0, activation_bits=4.0, description="W4 A4"
        )
        record = comparison.model_copy(update={"rows": [*comparison.rows, peer]})
        assert "SVDQuant, W4 A4" in texts_of(draw_svg(record))

    def test_nothing_but_peers_and_no_classifier(
        self, comparison: CompareRecord, make_compare_row: MakeRow
    ) -> None:
        blank = {"frechet_ratio": None, "network_mse": None}
        rows = [
            make_compare_row("awq", None, peer=True, name="peer-awq"),
            make_compare_row("other", None, peer=True, name="peer-other", **blank),
        ]
        assert "awq, " in texts_of(draw_svg(comparison.model_copy(update={"rows": rows})))
        texts = texts_of(draw_svg(comparison.model_copy(update={"rows": rows[1:]})))
        assert "not measured: the recipe names no classifier" in texts

    def test_ratios_far_apart_are_on_a_logarithmic_axis(
        self, comparison: CompareRecord, make_compare_row: MakeRow
    ) -> None:
        rows = [make_compare_row("uniform", 2.0), make_compare_row("uniform", 4.0)]
        texts = texts_of(draw_svg(comparison.model_copy(update={"rows": rows})))
        assert {"2", "5", "10"} <= texts

    def test_ticks_of_many_decades(
        self, comparison: CompareRecord, make_compare_row: MakeRow
    ) -> None:
        rows = [
            make_compare_row("tss", bits, network_mse=mse)
            for bits, mse in ((3.0, 1e-1), (4.0, 1e-6))
        ]
        texts = texts_of(draw_svg(comparison.model_copy(update={"rows": rows})))
        assert {"0.1", "0.001"} <= texts
        assert "0.002" not in texts


class TestPage:
    def test_stands_alone_and_says_what_is_emulated(
        self, comparison: CompareRecord, tmp_path: Path
    ) -> None:
        html = render_comparison(comparison, tmp_path, "treeq-export compare r.yaml")
        assert render_comparison(comparison, tmp_path, "treeq-export compare r.yaml") == html
        assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", html)
        assert "<script" not in html
        assert "fake-quantized in PyTorch" in html
        assert "2 cells still to come" in html
        assert html.count('<tr class="first">') == 3
        assert "treeq-export compare r.yaml" in html
        assert "samples/fp.png: missing" in html

    def test_shows_the_samples_of_every_cell(
        self, comparison: CompareRecord, tmp_path: Path
    ) -> None:
        for row in comparison.rows:
            folder = tmp_path / "cells" / row.name / "samples"
            folder.mkdir(parents=True)
            for name in ("fp", "quantized"):
                Image.new("L", (8, 8)).save(folder / f"{name}.png")
        html = render_comparison(comparison, tmp_path, "")
        titles = re.findall(r"<figcaption>(.*?)</figcaption>", html)
        assert titles[0] == "Full precision"
        assert "tss + PEFT, budget 3" in titles
        assert titles[-1] == "modelopt_int8_max, W8A8"
        assert html.count("data:image/png") == len(comparison.rows) + 1

    def test_before_the_first_cell(self, comparison: CompareRecord, tmp_path: Path) -> None:
        blank = {"rows": [], "fp_frechet_distance": None, "fp_class_accuracy": None}
        html = render_comparison(comparison.model_copy(update=blank), tmp_path, "")
        assert "0 cells" in html
        assert "<svg" not in html

    def test_names_are_escaped(self, comparison: CompareRecord, tmp_path: Path) -> None:
        odd = comparison.model_copy(update={"name": "<b>&"})
        assert "&lt;b&gt;&amp;: where the bits go" in render_comparison(odd, tmp_path, "")
