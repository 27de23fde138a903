import math
from collections.abc import Callable
from pathlib import Path

import pytest

from treeq_export.records import (
    LayerParity,
    ParityRecord,
    QualityRecord,
    SearchRecord,
    save_record,
)
from treeq_export.report import Report

Build = Callable[[], Report]
PrintText = Callable[[Report], str]


def lines_with(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


def test_print_shows_the_numbers_of_every_section(
    run: Path, build: Build, print_text: PrintText
) -> None:
    text = print_text(build())
    assert lines_with(text, "average weight bits", "5.00")
    assert lines_with(text, "branch parameters", "12.5 %")
    assert lines_with(text, "Frechet distance", "3.250", "3.750")
    assert lines_with(text, "class accuracy", "98.5 %", "97.0 %")
    assert lines_with(text, "PSNR", "24.5 dB")
    assert lines_with(text, "Parity of portable", "51.2 dB", "0.0025", "passed")
    assert lines_with(text, "blocks.0.ff.up", "96.5", "99.95 %")
    assert lines_with(text, "blocks.0.attn.to_q", "inf", "100.00 %")
    assert lines_with(text, "portable", "52 MB", "71 MB", "0.2 s")
    assert lines_with(text, "portable", "2 kB", "2.10x")
    assert lines_with(text, "fp32", "4.2 kB")
    assert lines_with(text, "All 5 gates passed")
    assert lines_with(text, "Page:", str(run / "report.html"))


def test_print_gives_a_ratio_with_interval_for_every_batch(
    build: Build, print_text: PrintText
) -> None:
    text = print_text(build())
    rows = [line.split() for line in lines_with(text, " .. ")]
    assert [row[:4] for row in rows] == [
        ["portable", "2", "4", "1.50x"],
        ["ort", "2", "7.5", "0.80x"],
        ["portable", "8", "16", "1.50x"],
        ["ort", "8", "30", "0.80x"],
    ]
    assert rows[0][4:] == ["1.38", "..", "1.62"]


def test_print_names_the_failing_gate(
    run: Path, build: Build, print_text: PrintText, make_parity: Callable[..., ParityRecord]
) -> None:
    save_record(run / "parity.json", make_parity(31.25))
    text = print_text(build())
    assert lines_with(text, "ort least layer sqnr_db", "31.25", ">= 40", "FAILED")
    assert lines_with(text, "portable", "all 2 passed")
    assert lines_with(text, "Parity of ort", "FAILED")
    assert lines_with(text, "1 of 5 gates failed: ort least layer sqnr_db")


@pytest.mark.parametrize(
    ("section", "stage"), [("parity", "validate"), ("bench", "bench"), ("quality", "evaluate")]
)
def test_print_says_how_to_measure_what_is_missing(
    run: Path, build: Build, print_text: PrintText, section: str, stage: str
) -> None:
    (run / f"{section}.json").unlink()
    text = print_text(build())
    assert f"{section}: not measured: run `treeq-export {stage} --run {run}`" in text
    assert f"Incomplete: {section} not measured" in text


def test_print_shows_the_worst_five_layers_in_order(
    run: Path, build: Build, print_text: PrintText, make_parity: Callable[..., ParityRecord]
) -> None:
    record = make_parity()
    layers = [
        LayerParity(
            name=f"layer{number}",
            sqnr_db=sqnr_db,
            max_abs_error=0.0,
            equal_code_fraction=1.0,
            accumulators_equal=True,
            propagated_sqnr_db=50.0,
            quantization_sqnr_db=20.0,
        )
        for number, sqnr_db in enumerate([70.0, math.nan, 60.0, 90.0, 80.0, math.inf, 50.0])
    ]
    target = record.targets[0].model_copy(update={"layers": layers})
    save_record(run / "parity.json", record.model_copy(update={"targets": [target]}))
    text = print_text(build())
    assert lines_with(text, "worst 5 of 7 layers")
    shown = [line.split()[:2] for line in lines_with(text, "layer", "100.00 %")]
    assert shown == [
        ["layer1", "nan"],
        ["layer6", "50.0"],
        ["layer2", "60.0"],
        ["layer0", "70.0"],
        ["layer4", "80.0"],
    ]


def test_print_takes_names_literally(
    run: Path, build: Build, print_text: PrintText, make_parity: Callable[..., ParityRecord]
) -> None:
    record = make_parity()
    layers = [record.targets[0].layers[0].model_copy(update={"name": "[red]odd[/red]"})]
    target = record.targets[0].model_copy(update={"layers": layers})
    save_record(run / "parity.json", record.model_copy(update={"targets": [target]}))
    assert "[red]odd[/red]" in print_text(build())


def test_print_says_not_measured_without_a_classifier(
    run: Path, build: Build, print_text: PrintText, quality: QualityRecord
) -> None:
    blank = {"frechet_distance": None, "class_accuracy": None}
    fp, quantized = (s.model_copy(update=blank) for s in (quality.fp, quality.quantized))
    changed = quality.model_copy(update={"fp": fp, "quantized": quantized})
    save_record(run / "quality.json", changed)
    text = print_text(build())
    assert lines_with(text, "Frechet distance")[0].count("not measured") == 2
    assert lines_with(text, "class accuracy")[0].count("not measured") == 2


def test_print_of_a_searched_run(searched_run: Path, build: Build, print_text: PrintText) -> None:
    text = print_text(build())
    [line] = lines_with(text, "Search: tss, 2 leaves, 300 evaluations (288 announced)")
    assert line.endswith("in 2 min 1 s, network MSE 0.25")
    [line] = lines_with(text, "Finetune: peft, 1,234 numbers, 200 steps in 75.0 s")
    assert line.endswith("held-out network MSE 0.008 -> 0.003")
    assert lines_with(text, "full precision", "uniform bits", "quantized")
    [line] = lines_with(text, "Frechet distance")
    assert line.split() == ["Frechet", "distance", "3.250", "9.500", "3.750"]
    [line] = lines_with(text, "network MSE, held out")
    assert line.split() == ["network", "MSE,", "held", "out", "0.0125", "0.005"]


def test_print_has_no_line_on_a_search_that_measured_nothing(
    run: Path, build: Build, print_text: PrintText, search: SearchRecord
) -> None:
    save_record(run / "search.json", search.model_copy(update={"cost": None}))
    assert not lines_with(print_text(build()), "Search:")


def test_print_announces_nothing_for_a_search_without_a_tree(
    run: Path, build: Build, print_text: PrintText, search: SearchRecord
) -> None:
    greedy = search.model_copy(update={"strategy": "greedy", "nodes": []})
    save_record(run / "search.json", greedy)
    [line] = lines_with(print_text(build()), "Search: greedy, 2 leaves")
    assert "300 evaluations in 2 min 1 s" in line
