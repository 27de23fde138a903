import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from treeq_export.errors import OutputError, PlanError
from treeq_export.records import (
    BenchRecord,
    CompileRecord,
    LayerParity,
    ParityRecord,
    QualityRecord,
    SearchRecord,
    save_record,
)
from treeq_export.report import Report
from treeq_export.report.report import Verdict, judge
from treeq_export.report.summary import (
    baseline_speedups,
    report_to_json,
    sort_worst_first,
)

Build = Callable[[], Report]


def read_strictly(run: Path) -> dict[str, Any]:
    """Parse report.json as a parser does that knows no NaN and no Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"bare {name}")

    return json.loads((run / "report.json").read_bytes(), parse_constant=refuse)


def verdict_of(report: Report) -> Verdict:
    return judge(report)


def test_report_json_has_exactly_the_keys_of_the_design(run: Path, write: Build) -> None:
    write()
    layers = [
        {"name": "blocks.0.attn.to_q", "sqnr_db": "Infinity", "equal_code_fraction": 1.0},
        {"name": "blocks.0.ff.up", "sqnr_db": 96.5, "equal_code_fraction": 0.9995},
        {"name": "blocks.1.ff.up", "sqnr_db": 111.5, "equal_code_fraction": None},
    ]
    parity = {
        "runtime": "ONNX Runtime CPU",
        "passed": True,
        "max_abs_error": 0.0025,
        "layers": layers,
    }
    content = read_strictly(run)
    rows = content["bench"].pop("rows")
    assert content == {
        "model": {"name": "tiny", "num_parameters": 1000, "num_quantized_layers": 3},
        "plan": {
            "average_weight_bits": 5.0,
            "average_activation_bits": 41 / 3,
            "branch_parameter_fraction": 48 / 384,
        },
        "quality": {
            "fp": {"frechet_distance": 3.25, "class_accuracy": 0.985},
            "quantized": {"frechet_distance": 3.75, "class_accuracy": 0.97, "psnr_db": 24.5},
            "num_samples": 100,
            "seed": 7,
            "network_mse": None,
            "baseline": None,
        },
        "parity": {"portable": {**parity, "sqnr_db": 51.25}, "ort": {**parity, "sqnr_db": 47.5}},
        "bench": {
            "speedup": {
                "portable": {"ratio": 1.5, "low": 1.375, "high": 1.625},
                "ort": {"ratio": 0.8, "low": 0.675, "high": 0.925},
            },
            "environment": {
                "cpu": {"model": "Test CPU", "cores": 2},
                "versions": {"numpy": "2.4.0"},
            },
        },
        "size": {"fp32_bytes": 4200, "portable": 2000, "ort": 800},
        "stages": {"search": 0.5, "calibrate": 130.0},
        "search": None,
        "finetune": None,
        "engines": None,
    }
    assert len(rows) == 8
    assert rows[2] == {
        "target": "portable",
        "batch": 2,
        "median_ms": 4.0,
        "all_times_ms": [3.5, 4.0, 8.0],
    }


def test_report_json_is_what_the_report_says(run: Path, write: Build) -> None:
    report = write()
    content = read_strictly(run)
    assert content == report_to_json(report)
    assert content["parity"]["ort"]["layers"][0]["sqnr_db"] == "Infinity"
    assert "evidence" not in content


def test_numbers_that_are_not_finite_are_strings(
    run: Path, write: Build, make_parity: Callable[..., ParityRecord], bench: BenchRecord
) -> None:
    save_record(run / "parity.json", make_parity(math.nan))
    odd = bench.model_copy(update={"environment": {"load": [math.nan, -math.inf]}})
    save_record(run / "bench.json", odd)
    write()
    content = read_strictly(run)
    assert content["parity"]["ort"]["layers"][1]["sqnr_db"] == "NaN"
    assert content["bench"]["environment"] == {"load": ["NaN", "-Infinity"]}


@pytest.mark.parametrize("section", ["parity", "bench", "quality"])
def test_a_section_that_was_not_measured_is_null(run: Path, write: Build, section: str) -> None:
    (run / f"{section}.json").unlink()
    report = write()
    content = read_strictly(run)
    missing = [key for key, value in content.items() if value is None]
    assert missing == [section, "search", "finetune", "engines"]
    assert verdict_of(report).state == "incomplete"
    assert verdict_of(report).missing == (section,)
    assert verdict_of(report).headline == f"Incomplete: {section} not measured"


def test_a_missing_compile_record_names_the_stage(run: Path, build: Build) -> None:
    (run / "compile.json").unlink()
    with pytest.raises(PlanError, match=r"compile\.json: missing\. Run `treeq-export compile"):
        build()


def test_a_malformed_record_is_an_error_and_not_unmeasured(run: Path, build: Build) -> None:
    (run / "parity.json").write_text('{"batch_size": 8}')
    with pytest.raises(PlanError, match=r"parity\.json: .+\. Run `treeq-export validate"):
        build()


def test_a_page_that_cannot_be_written_leaves_no_summary(run: Path, write: Build) -> None:
    (run / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"report\.html"):
        write()
    assert not (run / "report.json").exists()
    assert list(run.glob(".*")) == []


def test_speedup_falls_back_to_the_first_baseline(
    run: Path, build: Build, bench: BenchRecord
) -> None:
    others = [speedup for speedup in bench.speedups if speedup.baseline != "ort_fp32"]
    save_record(run / "bench.json", bench.model_copy(update={"speedups": others}))
    report = build()
    assert report_to_json(report)["bench"]["speedup"]["portable"]["ratio"] == 2.0


def test_speedup_is_of_the_first_batch_and_one_baseline(bench: BenchRecord) -> None:
    used = baseline_speedups(bench)
    assert {(s.target, s.baseline, s.batch) for s in used} == {
        ("portable", "ort_fp32", 2),
        ("portable", "ort_fp32", 8),
        ("ort", "ort_fp32", 2),
        ("ort", "ort_fp32", 8),
    }
    assert baseline_speedups(bench.model_copy(update={"speedups": []})) == []


def test_size_without_a_float32_graph_is_four_bytes_a_parameter(
    run: Path, build: Build, compiled: CompileRecord
) -> None:
    save_record(run / "compile.json", CompileRecord(targets=compiled.targets[:-1]))
    assert build().size == {"fp32_bytes": 4000, "portable": 2000, "ort": 800}


def test_scores_without_a_classifier_stay_null(
    run: Path, build: Build, quality: QualityRecord
) -> None:
    fp = quality.fp.model_copy(update={"frechet_distance": None, "class_accuracy": None})
    save_record(run / "quality.json", quality.model_copy(update={"fp": fp}))
    content = report_to_json(build())
    assert content["quality"]["fp"] == {"frechet_distance": None, "class_accuracy": None}


def test_verdict_passes_when_all_gates_do(build: Build) -> None:
    assert verdict_of(build()) == Verdict("passed", "All 5 gates passed", (), ())


def test_verdict_names_what_failed(
    run: Path, build: Build, make_parity: Callable[..., ParityRecord]
) -> None:
    save_record(run / "parity.json", make_parity(31.25))
    (run / "quality.json").unlink()
    verdict = verdict_of(build())
    assert verdict.state == "failed"
    assert verdict.headline == "1 of 4 gates failed"
    assert verdict.failed == ("ort least layer sqnr_db",)
    assert verdict.missing == ("quality",)


def test_verdict_fails_for_a_target_that_did_not_pass_for_another_reason(
    run: Path, build: Build, make_parity: Callable[..., ParityRecord]
) -> None:
    record = make_parity()
    broken = record.targets[0].model_copy(update={"passed": False, "gates": []})
    save_record(run / "parity.json", record.model_copy(update={"targets": [broken]}))
    verdict = verdict_of(build())
    assert (verdict.state, verdict.failed) == ("failed", ("portable parity",))


def test_verdict_without_gates_is_no_pass(build: Build) -> None:
    report = build()
    assert report.parity is not None
    assert report.quality is not None
    bare = replace(
        report,
        parity=report.parity.model_copy(update={"targets": []}),
        quality=report.quality.model_copy(update={"gates": []}),
    )
    assert judge(bare).state == "incomplete"
    assert "No gate was set" in judge(bare).headline


def test_targets_begin_with_the_one_that_made_the_images(build: Build) -> None:
    report = build()
    assert report.targets == ["portable", "ort"]
    assert replace(report, quality=None).targets == ["ort", "portable"]


def test_worst_layers_come_first_and_nan_is_worst() -> None:
    values = [50.0, math.inf, math.nan, -math.inf, 12.0]
    layers = [
        LayerParity(
            name=f"{v}",
            sqnr_db=v,
            max_abs_error=0.0,
            equal_code_fraction=None,
            accumulators_equal=None,
            propagated_sqnr_db=None,
            quantization_sqnr_db=0.0,
        )
        for v in values
    ]
    assert [layer.name for layer in sort_worst_first(layers)] == [
        "nan",
        "-inf",
        "12.0",
        "50.0",
        "inf",
    ]


def test_search_finetune_and_baseline_are_summarized(searched_run: Path, write: Build) -> None:
    write()
    content = read_strictly(searched_run)
    assert content["quality"]["network_mse"] == 0.005
    assert content["quality"]["baseline"] == {
        "frechet_distance": 9.5,
        "class_accuracy": 0.8,
        "psnr_db": 18.5,
        "strategy": "uniform",
        "average_weight_bits": 3.0,
        "average_activation_bits": 3.5,
        "network_mse": 0.0125,
    }
    assert content["search"] == {
        "strategy": "tss",
        "noise": 1.0,
        "budget": {"weight_bits": 3.0, "activation_bits": 3.0},
        "num_leaves": 2,
        "num_evaluations_announced": 288,
        "num_evaluations": 300,
        "estimate_s": 150.0,
        "seconds": 121.5,
        "network_mse": 0.25,
    }
    assert content["finetune"] == {
        "mode": "peft",
        "num_trained": 1234,
        "steps": 200,
        "mse_before": 0.008,
        "mse_after": 0.003,
        "seconds": 75.0,
    }


def test_a_search_that_announced_nothing(run: Path, write: Build, search: SearchRecord) -> None:
    save_record(run / "search.json", search.model_copy(update={"cost": None}))
    write()
    summary = read_strictly(run)["search"]
    names = ("num_leaves", "num_evaluations_announced", "estimate_s")
    assert [summary[name] for name in names] == [None, None, None]
