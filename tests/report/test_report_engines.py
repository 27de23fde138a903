"""Engines in report.json and on the page: only those of the present graphs, and what failed."""

import json
from collections.abc import Callable
from pathlib import Path

from treeq_export.records import BuildRecord, save_record
from treeq_export.report import Report


def test_engines_of_the_present_graphs_are_summarized(
    run: Path, engines: BuildRecord, write: Callable[..., Report]
) -> None:
    save_record(run / "build.json", engines)
    write()
    assert json.loads((run / "report.json").read_text())["engines"] == [
        {
            "runtime": "tensorrt-rtx",
            "runtime_version": "1.7.1",
            "gpu": "sm_89",
            "target": "tensorrt",
            "engine_bytes": 278_000_000,
            "build_s": 12.34,
            "num_quantized": 2,
            "num_verified": 1,
        }
    ]


def test_page_says_that_engines_were_not_run_and_what_is_not_as_planned(
    run: Path, engines: BuildRecord, write: Callable[..., Report]
) -> None:
    save_record(run / "build.json", engines)
    write()
    page = (run / "report.html").read_text()
    section = page[page.index('<section id="engines">') :].split("</section>")[0]
    assert "not run" in section
    assert "278 MB" in section
    assert "1 of 2" in section
    assert "1 plugin," in section
    assert section.count("sm_89") == 1


def test_page_without_engines_has_no_section(run: Path, write: Callable[..., Report]) -> None:
    write()
    assert 'id="engines"' not in (run / "report.html").read_text()
