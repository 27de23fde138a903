"""Key figures of a run. Every tile speaks of the same target first, so none is picked for looks."""

from dataclasses import dataclass

from treeq_export.records import Speedup
from treeq_export.report.evidence import Evidence
from treeq_export.report.quantities import (
    format_bytes,
    format_db,
    format_fixed,
    format_percent,
    format_ratio,
    name_with_runtime,
)
from treeq_export.report.summary import Report, baseline_speedups

UNMEASURED = "not measured"


@dataclass(frozen=True)
class Tile:
    """One key figure.

    Attributes:
        label: What it is.
        value: The figure.
        details: Lines that qualify it.
        measured: False where it is only a placeholder.
    """

    label: str
    value: str
    details: tuple[str, ...]
    measured: bool = True


def make_tiles(report: Report, evidence: Evidence) -> list[Tile]:
    """Return bits, size, speed, Frechet distance, accuracy and parity, in this order."""
    return [
        _tile_bits(report),
        _tile_size(report, evidence),
        _tile_speed(evidence),
        _tile_frechet(report),
        _tile_images(report),
        _tile_parity(report, evidence),
    ]


def _tile_bits(report: Report) -> Tile:
    plan = report.plan
    weight = format_fixed(plan.average_weight_bits)
    activation = format_fixed(plan.average_activation_bits)
    return Tile(
        "Average bits",
        f"W {weight} · A {activation}",
        (
            f"over {report.model.num_quantized_layers} layers, weighted by size",
            f"branch parameters: {format_percent(plan.branch_parameter_fraction)} of the weights",
        ),
    )


def _tile_size(report: Report, evidence: Evidence) -> Tile:
    full = report.size["fp32_bytes"]
    lines = [
        f"{name}: {format_bytes(report.size[name])} ({format_ratio(full / report.size[name])})"
        for name in evidence.targets
    ]
    if not lines:
        return Tile("Smaller than float32", UNMEASURED, ("no target compiled",), measured=False)
    first = evidence.targets[0]
    return Tile(
        f"Smaller than float32, {first}",
        format_ratio(full / report.size[first]),
        (*lines, f"float32: {format_bytes(full)}"),
    )


def _tile_speed(evidence: Evidence) -> Tile:
    label = "Speed against float32"
    if evidence.bench is None:
        return Tile(label, UNMEASURED, ("run treeq-export bench",), measured=False)
    rows = {row.batch for row in evidence.bench.rows[:1]}
    speedups = {
        speedup.target: speedup
        for speedup in baseline_speedups(evidence.bench)
        if speedup.batch in rows
    }
    shown = [speedups[name] for name in evidence.targets if name in speedups]
    if not shown:
        return Tile(label, UNMEASURED, ("no baseline was timed",), measured=False)
    return Tile(
        f"{label}, {shown[0].target}",
        format_ratio(shown[0].ratio),
        (
            *(f"{speedup.target}: {describe_speedup(speedup)}" for speedup in shown),
            f"against {shown[0].baseline}, batch {shown[0].batch}",
        ),
    )


def describe_speedup(speedup: Speedup) -> str:
    """Return a ratio with its interval, and a word where it is no gain.

    >>> describe_speedup(Speedup(target="ort", baseline="b", batch=2, ratio=0.8, low=0.7, high=0.9))
    '0.80x [0.70, 0.90] slower'
    """
    interval = f"[{format_fixed(speedup.low)}, {format_fixed(speedup.high)}]"
    word = ""
    if speedup.high < 1:
        word = " slower"
    elif speedup.low <= 1:
        word = " no clear difference"
    return f"{format_ratio(speedup.ratio)} {interval}{word}"


def _tile_frechet(report: Report) -> Tile:
    label = "Fréchet distance"
    if report.quality is None:
        return Tile(label, UNMEASURED, ("run treeq-export evaluate",), measured=False)
    full = report.quality.fp.frechet_distance
    quantized = report.quality.quantized.frechet_distance
    if full is None or quantized is None:
        return Tile(label, UNMEASURED, ("the recipe names no classifier",), measured=False)
    return Tile(
        label,
        f"{format_fixed(full)} → {format_fixed(quantized)}",
        ("full precision → quantized; lower is better", "to the features of real images"),
    )


def _tile_images(report: Report) -> Tile:
    label = "Class accuracy"
    if report.quality is None:
        return Tile(label, UNMEASURED, ("run treeq-export evaluate",), measured=False)
    quality = report.quality
    psnr = f"PSNR to full precision, equal seeds: {format_db(quality.quantized.psnr_db)} dB"
    if quality.quantized.psnr_db is None:
        psnr = f"PSNR to full precision: {UNMEASURED}"
    full, quantized = quality.fp.class_accuracy, quality.quantized.class_accuracy
    if full is None or quantized is None:
        return Tile(label, UNMEASURED, ("the recipe names no classifier", psnr), measured=False)
    return Tile(
        label,
        f"{format_percent(full)} → {format_percent(quantized)}",
        ("full precision → quantized", psnr),
    )


def _tile_parity(report: Report, evidence: Evidence) -> Tile:
    label = "Parity, end to end"
    shown = [name for name in evidence.targets if report.parity and name in report.parity]
    if not report.parity or not shown:
        return Tile(label, UNMEASURED, ("run treeq-export validate",), measured=False)
    names = {name: name_with_runtime(name, report.parity[name].runtime) for name in shown}
    return Tile(
        f"{label}, {names[shown[0]]}",
        f"{format_db(report.parity[shown[0]].sqnr_db)} dB",
        (
            *(f"{names[name]}: {format_db(report.parity[name].sqnr_db)} dB" for name in shown),
            "SQNR against the PyTorch reference with the same quantization",
        ),
    )
