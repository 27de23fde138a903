"""Key figures of a run. Every tile speaks of the same target first, so none is picked for looks."""

from dataclasses import dataclass

from treeq_export.records import Speedup
from treeq_export.report.quantities import (
    format_bytes,
    format_db,
    format_fixed,
    format_percent,
    format_ratio,
    name_with_runtime,
)
from treeq_export.report.report import Report
from treeq_export.report.summary import headline_speedups

UNMEASURED = "not measured"


@dataclass(frozen=True)
class Tile:
    """One key figure.

    Attributes:
        label: Name of the figure.
        value: The figure.
        details: Lines that qualify it.
        measured: False where it is only a placeholder.
    """

    label: str
    value: str
    details: tuple[str, ...]
    measured: bool = True


def make_tiles(report: Report) -> list[Tile]:
    """Return bits, size, speed, Frechet distance, accuracy and parity, in this order."""
    return [
        _tile_bits(report),
        _tile_size(report),
        _tile_speed(report),
        _tile_frechet(report),
        _tile_images(report),
        _tile_parity(report),
    ]


def _tile_bits(report: Report) -> Tile:
    plan = report.plan
    weight = format_fixed(plan.average_weight_bits)
    activation = format_fixed(plan.average_activation_bits)
    return Tile(
        "Average bits",
        f"W {weight} · A {activation}",
        (
            f"over {len(plan.layers)} layers, weighted by size",
            f"branch parameters: {format_percent(plan.branch_parameter_fraction)} of the weights",
        ),
    )


def _tile_size(report: Report) -> Tile:
    full = report.size["fp32_bytes"]
    lines = [
        f"{name}: {format_bytes(report.size[name])} ({format_ratio(full / report.size[name])})"
        for name in report.targets
    ]
    if not lines:
        return Tile("Smaller than float32", UNMEASURED, ("no target compiled",), measured=False)
    first = report.targets[0]
    return Tile(
        f"Smaller than float32, {first}",
        format_ratio(full / report.size[first]),
        (*lines, f"float32: {format_bytes(full)}"),
    )


def _tile_speed(report: Report) -> Tile:
    label = "Speed against float32"
    if report.bench is None:
        return Tile(label, UNMEASURED, ("run treeq-export bench",), measured=False)
    speedups = {speedup.target: speedup for speedup in headline_speedups(report.bench)}
    shown = [speedups[name] for name in report.targets if name in speedups]
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


def _tile_parity(report: Report) -> Tile:
    label = "Parity, end to end"
    targets = report.parity.targets if report.parity else []
    shown = [target for name in report.targets for target in targets if target.target == name]
    if not shown:
        return Tile(label, UNMEASURED, ("run treeq-export validate",), measured=False)
    lines = {
        name_with_runtime(target.target, target.runtime): f"{format_db(target.sqnr_db)} dB"
        for target in shown
    }
    first = next(iter(lines))
    return Tile(
        f"{label}, {first}",
        lines[first],
        (
            *(f"{name}: {value}" for name, value in lines.items()),
            "SQNR against the PyTorch reference with the same quantization",
        ),
    )
