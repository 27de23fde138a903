"""`report.json`: a run's records for programs, each cut down to what others rely on.

What was not measured is null: `quality`, `parity` and `bench` as a whole, and single scores within
`quality`. The file is strict JSON: a number that is not finite is one of the strings "Infinity",
"-Infinity" and "NaN" (an SQNR of "Infinity" is a bit-exact layer).

    bench.speedup   against ONNX Runtime in float32 ("ort_fp32") where that was timed, otherwise
                    against the first baseline of bench.json; at the first batch size timed
    quality         means over the seeds of quality.json; `seed` is the first of them
    size.fp32_bytes the float32 graph of the same exporter; 4 bytes a parameter if none was written
    search          null where there is no search.json; likewise finetune, quality.baseline, engines
"""

import json
import math
from collections.abc import Iterable
from typing import Any

from treeq_export.records import (
    BenchRecord,
    BuiltEngine,
    LayerParity,
    ParityRecord,
    QualityRecord,
    Record,
    SearchRecord,
    Speedup,
)
from treeq_export.report.report import Report

PREFERRED_BASELINE = "ort_fp32"

_SCORES = ("frechet_distance", "class_accuracy")
_PARITY = ("runtime", "passed", "sqnr_db", "max_abs_error")
_LAYER = ("name", "sqnr_db", "equal_code_fraction")
_ROW = ("target", "batch", "median_ms", "all_times_ms")
_FINETUNE = ("mode", "num_trained", "steps", "mse_before", "mse_after", "seconds")
_ENGINE = ("runtime", "runtime_version", "gpu", "target", "engine_bytes", "build_s")


def report_to_json(report: Report) -> dict[str, Any]:
    """Return what `report.json` holds; strings stand for numbers that are not finite."""
    plan = report.plan
    return {
        "model": {
            "name": plan.model.name,
            "num_parameters": plan.model.num_parameters,
            "num_quantized_layers": len(plan.layers),
        },
        "plan": {
            "average_weight_bits": plan.average_weight_bits,
            "average_activation_bits": plan.average_activation_bits,
            "branch_parameter_fraction": plan.branch_parameter_fraction,
        },
        "quality": report.quality and _quality(report.quality),
        "parity": report.parity and _parity(report.parity),
        "bench": report.bench and _bench(report.bench),
        "size": report.size,
        "stages": report.stages,
        "search": report.search and _search(report.search),
        "finetune": report.finetune and _pick(report.finetune, *_FINETUNE),
        "engines": [_engine(engine) for engine in report.engines] or None,
    }


def _pick(record: Record, *names: str) -> dict[str, Any]:
    """Return some fields of a record, in this order, as JSON has them."""
    values = json.loads(record.model_dump_json(include=set(names)))
    return {name: values[name] for name in names}


def _quality(record: QualityRecord) -> dict[str, Any]:
    baseline = record.baseline
    return {
        "fp": _pick(record.fp, *_SCORES),
        "quantized": _pick(record.quantized, *_SCORES, "psnr_db"),
        "num_samples": record.num_samples,
        "seed": record.seeds[0].seed,
        **_pick(record, "network_mse"),
        "baseline": baseline
        and {
            **_pick(baseline.scores, *_SCORES, "psnr_db"),
            "strategy": baseline.strategy,
            "average_weight_bits": baseline.weight_bits,
            "average_activation_bits": baseline.activation_bits,
            **_pick(baseline, "network_mse"),
        },
    }


def _parity(record: ParityRecord) -> dict[str, Any]:
    return {
        target.target: _pick(target, *_PARITY)
        | {"layers": [_pick(layer, *_LAYER) for layer in target.layers]}
        for target in record.targets
    }


def _bench(record: BenchRecord) -> dict[str, Any]:
    return {
        "rows": [_pick(row, *_ROW) for row in record.rows],
        "speedup": {
            speedup.target: _pick(speedup, "ratio", "low", "high")
            for speedup in headline_speedups(record)
        },
        **_pick(record, "environment"),
    }


def _search(record: SearchRecord) -> dict[str, Any]:
    """Return how the search went; what was announced is the tree's cost, null for the others."""
    announced = record.cost if record.nodes else None
    return {
        **_pick(record, "strategy", "noise", "budget"),
        "num_leaves": record.cost and record.cost.num_leaves,
        "num_evaluations_announced": announced and announced.num_evaluations,
        "num_evaluations": record.num_measured + record.num_from_journal,
        "estimate_s": announced and announced.estimate_s,
        **_pick(record, "seconds", "network_mse"),
    }


def _engine(engine: BuiltEngine) -> dict[str, Any]:
    """Return one engine: the layers that it has to run in integers, and those that it does."""
    verified = engine.manifest.verifier
    return _pick(engine.manifest, *_ENGINE) | {
        "num_quantized": verified.num_quantized,
        "num_verified": verified.num_plugins + verified.num_int8_gemms,
    }


def headline_speedups(record: BenchRecord) -> list[Speedup]:
    """Return the speedups of report.json: one baseline, the first batch size."""
    batch = record.rows[0].batch if record.rows else None
    return [speedup for speedup in baseline_speedups(record) if speedup.batch == batch]


def baseline_speedups(record: BenchRecord) -> list[Speedup]:
    """Return all speedups against the one baseline that the report uses."""
    baselines = [speedup.baseline for speedup in record.speedups]
    if PREFERRED_BASELINE in baselines:
        baselines = [PREFERRED_BASELINE]
    return [speedup for speedup in record.speedups if speedup.baseline in baselines[:1]]


def sort_worst_first(layers: Iterable[LayerParity]) -> list[LayerParity]:
    """Return layers by ascending own SQNR: nan first, then -inf; equal ones in the order given."""
    return sorted(
        layers,
        key=lambda layer: (0, 0.0) if math.isnan(layer.sqnr_db) else (1, layer.sqnr_db),
    )
