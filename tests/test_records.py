"""Results survive a trip through their JSON files."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from treeq_export.errors import OutputError, PlanError
from treeq_export.records import (
    AuditLayer,
    BenchMemory,
    BenchRecord,
    BenchRow,
    CompiledTarget,
    CompileRecord,
    GateResult,
    LayerParity,
    ParityRecord,
    QualityRecord,
    QualityScores,
    Record,
    SeedQuality,
    Speedup,
    TargetParity,
    load_record,
    save_record,
)

INF, NAN = math.inf, math.nan

SCORES = QualityScores(frechet_distance=1.25, class_accuracy=0.5)
NO_CLASSIFIER = QualityScores(frechet_distance=None, class_accuracy=None, psnr_db=INF)
RECORDS: list[tuple[str, Record]] = [
    (
        "compile",
        CompileRecord(
            targets=[
                CompiledTarget(
                    target="ort",
                    path="onnx/ort/model.onnx",
                    size_bytes=12,
                    sha256="ab",
                    audit=[AuditLayer(name="a", op_type="QLinear", integer=True)],
                )
            ]
        ),
    ),
    (
        "validate",
        ParityRecord(
            batch_size=2,
            seed=0,
            targets=[
                TargetParity(
                    target="portable",
                    passed=True,
                    sqnr_db=INF,
                    max_abs_error=0.0,
                    layers=[
                        LayerParity(
                            name="a",
                            sqnr_db=INF,
                            max_abs_error=0.1,
                            equal_code_fraction=None,
                            accumulators_equal=None,
                            propagated_sqnr_db=-INF,
                            quantization_sqnr_db=12.5,
                        )
                    ],
                    gates=[GateResult.of("g", INF, 40.0, at_least=True)],
                )
            ],
        ),
    ),
    (
        "bench",
        BenchRecord(
            rows=[BenchRow(target="ort", batch=2, median_ms=0.1, all_times_ms=[0.1, 1 / 3])],
            memory=[
                BenchMemory(
                    target="ort", after_load_bytes=1, peak_bytes=2, load_s=0.5, file_bytes=3
                )
            ],
            speedups=[
                Speedup(target="ort", baseline="fp32", batch=2, ratio=2.0, low=1.5, high=2.5)
            ],
            environment={"cpu": "x", "threads": 2, "load": [0.5]},
        ),
    ),
    (
        "evaluate",
        QualityRecord(
            num_samples=2,
            runner="torch",
            conditioning="labels",
            seeds=[SeedQuality(seed=0, fp=SCORES, quantized=NO_CLASSIFIER)],
            fp=SCORES,
            quantized=NO_CLASSIFIER,
            grids={"fp": "samples/fp.png"},
            gates=[],
        ),
    ),
]


@pytest.mark.parametrize(("stage", "record"), RECORDS, ids=[stage for stage, _ in RECORDS])
def test_roundtrip(stage: str, record: Record, tmp_path: Path):
    path = tmp_path / "run" / "record.json"
    save_record(path, record)
    first = path.read_bytes()
    assert load_record(path, type(record), stage) == record
    save_record(path, load_record(path, type(record), stage))
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("value", "written"), [(INF, "Infinity"), (-INF, "-Infinity"), (NAN, "NaN"), (1.5, 1.5)]
)
def test_the_file_is_strict_json_even_for_non_finite_numbers(
    value: float, written: Any, tmp_path: Path
):
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    path = tmp_path / "record.json"
    save_record(path, SCORES.model_copy(update={"psnr_db": value}))
    assert json.loads(path.read_text(), parse_constant=refuse)["psnr_db"] == written
    found = load_record(path, QualityScores, "evaluate").psnr_db
    assert found == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize(
    ("measured", "limit", "at_least", "passed"),
    [
        (41.0, 40.0, True, True),
        (40.0, 40.0, True, True),
        (39.9, 40.0, True, False),
        (INF, 40.0, True, True),
        (-INF, 40.0, True, False),
        (NAN, 40.0, True, False),
        (NAN, -INF, True, False),
        (1.5, 1.6, False, True),
        (1.6, 1.6, False, True),
        (1.7, 1.6, False, False),
        (INF, 1.6, False, False),
        (NAN, 1.6, False, False),
        (NAN, INF, False, False),
    ],
)
@pytest.mark.parametrize("kind", [float, np.float64])
def test_gates(measured: float, limit: float, at_least: bool, passed: bool, kind: type):
    result = GateResult.of("psnr", kind(measured), limit, at_least=at_least)
    assert result.passed is passed
    assert (result.name, result.limit, result.at_least) == ("psnr", limit, at_least)
    assert result.measured == pytest.approx(measured, nan_ok=True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"targets": 3}',
        '{"targets": [], "surplus": 1}',
        '{"targets": [{"target": "ort"}]}',
        "\x00\x01",
    ],
)
def test_a_malformed_file_names_the_stage(text: str, tmp_path: Path):
    path = tmp_path / "compile.json"
    path.write_text(text)
    with pytest.raises(PlanError) as caught:
        load_record(path, CompileRecord, "compile")
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert line.endswith(f". Run `treeq-export compile --run {tmp_path}` again.")
    assert "\n" not in line


def test_bytes_that_are_no_text_are_malformed(tmp_path: Path):
    path = tmp_path / "compile.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(PlanError, match="not UTF-8 at byte 0"):
        load_record(path, CompileRecord, "compile")


@pytest.mark.parametrize("stage", ["compile", "bench"])
def test_a_missing_file_names_the_stage(stage: str, tmp_path: Path):
    path = tmp_path / f"{stage}.json"
    with pytest.raises(PlanError) as caught:
        load_record(path, CompileRecord, stage)
    assert str(caught.value) == (
        f"{path}: missing. Run `treeq-export {stage} --run {tmp_path}` first."
    )


def test_an_unwritable_folder(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file/record\.json: cannot be written"):
        save_record(tmp_path / "file" / "record.json", SCORES)
