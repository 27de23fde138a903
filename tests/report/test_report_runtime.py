"""Parity of a target that was emulated says so wherever it is shown."""

from collections.abc import Callable
from pathlib import Path

from treeq_export.records import EMULATED, ParityRecord, save_record
from treeq_export.report import Report, report_to_json

Build = Callable[[], Report]


def emulate(record: ParityRecord) -> ParityRecord:
    portable, ort = record.targets
    return record.model_copy(
        update={"targets": [portable, ort.model_copy(update={"runtime": EMULATED})]}
    )


def test_emulated_rows_are_labelled(
    run: Path,
    build: Build,
    print_text: Callable[[Report], str],
    full_page: Callable[[], str],
    make_parity: Callable[..., ParityRecord],
) -> None:
    label = f"ort, {EMULATED}"
    assert label not in print_text(build())
    assert label not in full_page()
    save_record(run / "parity.json", emulate(make_parity()))
    report = build()
    assert report_to_json(report)["parity"]["ort"]["runtime"] == EMULATED
    text = print_text(report)
    [line] = [line for line in text.splitlines() if f"Parity of {label}" in line]
    assert "47.5 dB" in line
    page = full_page()
    # The table, the title of the layers, the plot and the tile.
    assert f"<th>{label}</th>" in page
    assert f"<summary>{label}: all" in page
    assert page.count(label) >= 3
    assert "ort (emulated)" in page
    assert "portable (emulated)" not in page
    assert f"portable, {EMULATED}" not in page
