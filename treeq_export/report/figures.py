"""Plots of the report: parity by layer, times, sizes."""

# matplotlib's stubs leave its **kwargs untyped.
# pyright: reportUnknownMemberType=false

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from treeq_export.records import ORT_CPU, BenchRow, LayerParity, TargetParity
from treeq_export.report.quantities import (
    INFINITY,
    format_bytes,
    format_limit,
    format_number,
    format_ratio,
)
from treeq_export.report.svg import (
    ALARM,
    BAND,
    BASELINE,
    INK,
    OURS,
    SECOND,
    THIRD,
    make_panels,
    to_svg,
)

# A raw time beyond this many times the slowest median is drawn at the edge, so that one
# interrupted round does not flatten all bars.
EDGE = 1.6
# An SQNR of infinity is drawn this far above the best finite one.
HEADROOM_DB = 15.0


def draw_parity(targets: Sequence[TargetParity], blocks: Mapping[str, int], limit_db: float) -> str:
    """Draw the SQNR of every layer, one panel per target.

    Args:
        targets: The targets, each with its layers in execution order.
        blocks: Number of the block of each layer.
        limit_db: The gate on a layer's own error.

    Returns:
        SVG text: own error as dots, propagated and quantization error as lines. A value of
        infinity is a triangle at a labelled level; one that is nan or -infinity, a cross below.
    """

    def draw(figure: Figure) -> None:
        for axes, target in zip(make_panels(figure, len(targets)), targets, strict=True):
            _draw_layers(axes, target.layers, blocks, limit_db)
            # The table beside it names the runtime; here the legend leaves no room for it.
            emulated = "" if target.runtime == ORT_CPU else " (emulated)"
            axes.set_title(f"{target.target}{emulated}")

    return to_svg("parity", 3.3 * len(targets), draw)


def _draw_layers(
    axes: Axes, layers: Sequence[LayerParity], blocks: Mapping[str, int], limit_db: float
) -> None:
    series = (
        ("quantization, against full precision", "quantization_sqnr_db", SECOND, "-"),
        ("propagated through the network", "propagated_sqnr_db", THIRD, "-"),
        ("own error", "sqnr_db", OURS, "none"),
    )
    # A value inside a fused node has no propagated error: the line goes on to the next that has.
    values: dict[str, dict[int, float]] = {
        key: {x: v for x, layer in enumerate(layers) if (v := getattr(layer, key)) is not None}
        for _, key, _, _ in series
    }
    finite = [v for column in values.values() for v in column.values() if math.isfinite(v)]
    limits = [limit_db] if math.isfinite(limit_db) else []
    top = max([*finite, *limits, 0.0]) + HEADROOM_DB
    bottom = min([*finite, 0.0]) - HEADROOM_DB
    small = 4.5 if len(layers) <= 80 else 2.6
    for label, key, color, style in series:
        drawn = {x: _drawable(value, top, bottom) for x, value in values[key].items()}
        inside = [y if bottom < y < top else math.nan for y in drawn.values()]
        axes.plot(
            list(drawn),
            inside,
            marker="o",
            markersize=small * 0.55 if style == "-" else small,
            linestyle=style,
            linewidth=1.3,
            color=color,
            label=label,
        )
        for edge, marker in ((top, "^"), (bottom, "x")):
            places = [x for x, y in drawn.items() if y == edge]
            axes.plot(places, [edge] * len(places), marker, color=color, markersize=small)
    missed = [x for x, value in values["sqnr_db"].items() if bottom < value < limit_db]
    axes.plot(missed, [values["sqnr_db"][x] for x in missed], "o", color=ALARM, markersize=small)
    for limit in limits:
        label = f"gate on own error, {format_limit(limit)} dB"
        axes.axhline(limit, color=ALARM, linewidth=0.9, linestyle=(0, (4, 3)), label=label)
    _label_levels(axes, top, bottom, [y for column in values.values() for y in column.values()])
    _mark_blocks(axes, [blocks.get(layer.name) for layer in layers])
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, fontsize=8)


def _drawable(value: float, top: float, bottom: float) -> float:
    if value == math.inf:
        return top
    return value if math.isfinite(value) else bottom


def _label_levels(axes: Axes, top: float, bottom: float, values: Sequence[float]) -> None:
    """Tick the finite range in round numbers, and the two levels for what is not finite."""
    step = next(s for s in (10, 20, 50, 100, 1000) if (top - bottom) / s <= 9)
    first = math.ceil((bottom + HEADROOM_DB) / step) * step
    ticks: list[float] = [float(t) for t in np.arange(first, top - 0.7 * HEADROOM_DB, step)]
    labels = [format_number(tick) for tick in ticks]
    if math.inf in values:
        ticks.append(top)
        labels.append(f"{INFINITY}: bit-exact")
    lowest = bottom + HEADROOM_DB * 0.8
    if any(not math.isfinite(value) and value != math.inf for value in values):
        ticks.append(bottom)
        labels.append("nan, -inf")
        lowest = bottom - HEADROOM_DB * 0.4
    axes.set_yticks(ticks, labels)
    axes.set_ylim(lowest, top + HEADROOM_DB * 0.4)
    axes.set_ylabel("SQNR, dB")


def _mark_blocks(axes: Axes, blocks: Sequence[int | None]) -> None:
    """Shade every other block and number the blocks on the x axis."""
    ticks: list[float] = []
    labels: list[str] = []
    start = 0
    for at, (block, members) in enumerate(groupby(blocks)):
        end = start + len(list(members))
        if at % 2:
            axes.axvspan(start - 0.5, end - 0.5, color=BAND, linewidth=0)
        ticks.append((start + end - 1) / 2)
        labels.append("?" if block is None else str(block))
        start = end
    every = max(1, math.ceil(len(ticks) / 40))
    axes.set_xticks(ticks[::every], labels[::every])
    axes.set_xlim(-0.7, max(start, 1) - 0.3)
    axes.set_xlabel("layers in execution order, by block")
    axes.grid(visible=False, axis="x")


def draw_speed(rows: Sequence[BenchRow], ours: Iterable[str]) -> str:
    """Draw the median of every target as a bar and all raw times as dots, a panel per batch.

    Args:
        rows: The times.
        ours: Names of our targets; the other bars are baselines.

    Returns:
        SVG text. Dots run from the first round at a bar's upper edge to the last at its lower.
    """
    batches = list(dict.fromkeys(row.batch for row in rows))
    panels = [[row for row in rows if row.batch == batch] for batch in batches]

    def draw(figure: Figure) -> None:
        heights = [len(panel) + 1.4 for panel in panels]
        for axes, panel in zip(make_panels(figure, len(panels), heights), panels, strict=True):
            _draw_times(axes, panel, set(ours))
            axes.set_title(f"batch {panel[0].batch}")
        figure.supxlabel("milliseconds per call; bar: median, dots: every round, first on top")

    return to_svg("speed", sum(0.42 * len(panel) + 0.85 for panel in panels), draw)


def _draw_times(axes: Axes, rows: Sequence[BenchRow], ours: set[str]) -> None:
    edge = EDGE * max(row.median_ms for row in rows)
    widest = max(min(time, edge) for row in rows for time in [row.median_ms, *row.all_times_ms])
    colors = [OURS if row.target in ours else BASELINE for row in rows]
    medians = [row.median_ms for row in rows]
    axes.barh(range(len(rows)), medians, height=0.62, color=colors, alpha=0.8)
    for at, row in enumerate(rows):
        times = np.asarray(row.all_times_ms)
        spread = at + np.linspace(-0.24, 0.24, len(times)) if len(times) > 1 else np.array([at])
        late = times > edge
        axes.plot(times[~late], spread[~late], "o", color=INK, markersize=2.0, alpha=0.65)
        axes.plot(np.full(late.sum(), edge), spread[late], ">", color=ALARM, markersize=3.5)
        text = f"{format_number(row.median_ms)} ms"
        if late.any():
            text += f"  ({late.sum()} beyond the axis, up to {format_number(times.max())} ms)"
        axes.annotate(
            text,
            (1.0, at),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=INK,
        )
    _finish_bars(axes, [row.target for row in rows], widest * 1.04)


def draw_sizes(sizes: Sequence[tuple[str, int]], full_bytes: int) -> str:
    """Draw the size of every graph as a bar.

    Args:
        sizes: Name and bytes; the float32 graph is the one called "fp32".
        full_bytes: Bytes that the ratios refer to.

    Returns:
        SVG text.
    """

    def draw(figure: Figure) -> None:
        (axes,) = make_panels(figure, 1)
        values = [size / 1e6 for _, size in sizes]
        colors = [BASELINE if name == "fp32" else OURS for name, _ in sizes]
        axes.barh(range(len(sizes)), values, height=0.62, color=colors, alpha=0.8)
        for at, (_, size) in enumerate(sizes):
            smaller = f"  ({format_ratio(full_bytes / size)} smaller)" if size < full_bytes else ""
            axes.annotate(
                format_bytes(size) + smaller,
                (size / 1e6, at),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                color=INK,
            )
        _finish_bars(axes, [name for name, _ in sizes], max(values) * 1.3)
        axes.set_xlabel("megabytes (1e6 bytes), model and external data")

    return to_svg("size", 0.42 * len(sizes) + 0.7, draw)


def _finish_bars(axes: Axes, names: Sequence[str], right: float) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlim(0, right)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
