"""The picture of a comparison: Pareto fronts on the left, what the images became on the right.

Left: network MSE over average bits, one line per strategy and training, and behind them the
configurations that the tree-structured search kept and dropped at its root. Right: Frechet
distance over full precision's, with the standard deviation over the seeds.
"""

# matplotlib's stubs leave its **kwargs untyped.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import offset_copy

from treeq_export.compare.view import label_of
from treeq_export.records import CompareRecord, CompareRow, SearchPoint
from treeq_export.report.svg import (
    BASELINE,
    INK,
    MARKERS,
    MUTED,
    OURS,
    SECOND,
    THIRD,
    to_png,
    to_svg,
)

HEIGHT_IN = 4.7
COLORS = {"uniform": BASELINE, "tss": OURS, "integer_programming": SECOND, "greedy": THIRD}
STYLES = {"ptq": ("-", "o"), "peft": ((0, (4, 2)), "s"), "qat": ((0, (1, 1.5)), "^")}
PEER_MARKERS = ("D", "P", "X", "*", "v", "<")
TSS = "tss"
_MARGIN_BITS = 0.35
_LINEAR_BELOW = 3.0  # largest over least value
_DECADES_FROM = 3000.0  # from here on only powers of ten are ticked
_SPREAD_PT = 3.0  # lines are drawn beside each other, so that no error bar hides another

Value = Callable[[CompareRow], float | None]


class Limits(NamedTuple):
    """Extent of the axis of bits: that of the strategies; peers beyond it stand at its edge."""

    low: float
    high: float


def draw_svg(record: CompareRecord) -> str:
    """Return the picture as inline SVG for the page."""
    return to_svg("compare", HEIGHT_IN, lambda figure: draw_comparison(figure, MARKERS, record))


def draw_png(record: CompareRecord) -> bytes:
    """Return the picture as a PNG file."""
    return to_png(HEIGHT_IN, lambda figure, palette: draw_comparison(figure, palette, record))


def draw_comparison(figure: Figure, palette: Mapping[str, str], record: CompareRecord) -> None:
    """Draw both panels.

    Args:
        figure: Figure to draw on.
        palette: The colour to use for each marker colour.
        record: The table.
    """
    left, right = figure.subplots(1, 2)
    limits = _bit_limits(record.rows)
    _draw_root(left, palette, record.rows, limits)
    _draw_lines(figure, left, palette, record.rows, lambda row: row.network_mse)
    _draw_peers(left, palette, record.rows, limits, lambda row: row.network_mse)
    _make_logarithmic(left)
    left.set_title("Network error: Pareto fronts")
    left.set_ylabel("network MSE on held-out inputs")
    _draw_lines(figure, right, palette, record.rows, _ratio)
    _draw_peers(right, palette, record.rows, limits, _ratio)
    right.axhline(1.0, color=palette[MUTED], linewidth=0.9, linestyle=(0, (4, 3)))
    ratios = [ratio for row in record.rows if (ratio := _ratio(row)) is not None]
    if not ratios:
        _say_nothing_measured(right, palette)
    elif max(ratios) > _LINEAR_BELOW * min(ratios):
        _make_logarithmic(right)
    right.set_title(f"Images: mean and standard deviation over {len(record.seeds)} seeds")
    right.set_ylabel("Frechet distance / full precision's")
    for axes in (left, right):
        axes.set_xlim(limits)
        axes.set_xlabel("average bits, mean of weights and activations")
    handles, labels = left.get_legend_handles_labels()  # lines after the dots behind them
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)


def _ratio(row: CompareRow) -> float | None:
    return None if row.frechet_ratio is None else row.frechet_ratio.mean


def _bit_limits(rows: Sequence[CompareRow]) -> Limits:
    bits = [row.average_bits for row in rows if not row.peer] or [row.average_bits for row in rows]
    low, high = (min(bits), max(bits)) if bits else (2.0, 4.0)
    return Limits(low - _MARGIN_BITS, high + _MARGIN_BITS)


def _series(rows: Sequence[CompareRow]) -> dict[tuple[str, str], list[CompareRow]]:
    """Return the rows of each line, by strategy and variant, ascending in bits."""
    lines: dict[tuple[str, str], list[CompareRow]] = {}
    for row in sorted(rows, key=lambda row: row.average_bits):
        if not row.peer:
            lines.setdefault((row.strategy, row.variant), []).append(row)
    order = {name: at for at, name in enumerate(COLORS)}
    return dict(sorted(lines.items(), key=lambda item: (item[0][1] != "ptq", order[item[0][0]])))


def _draw_lines(
    figure: Figure, axes: Axes, palette: Mapping[str, str], rows: Sequence[CompareRow], value: Value
) -> None:
    """Draw a line per strategy and training, with error bars where the value has a spread."""
    lines = _series(rows)
    for at, ((strategy, variant), members) in enumerate(lines.items()):
        known = [(row, y) for row in members if (y := value(row)) is not None]
        if not known:
            continue
        style, marker = STYLES[variant]
        spreads = [_std(row) if value is _ratio else 0.0 for row, _ in known]
        shift = _SPREAD_PT * (at - (len(lines) - 1) / 2) if value is _ratio else 0.0
        axes.errorbar(
            [row.average_bits for row, _ in known],
            [y for _, y in known],
            yerr=spreads if value is _ratio else None,
            transform=offset_copy(axes.transData, figure, x=shift, units="points"),
            color=palette[COLORS[strategy]],
            linestyle=style,
            marker=marker,
            markersize=5.0 if strategy == TSS else 4.0,
            linewidth=1.8 if strategy == TSS else 1.3,
            elinewidth=0.9,
            capsize=2.0,
            zorder=3 if strategy == TSS else 2.5,
            label=label_of(known[0][0]),
        )
        for (row, y), spread in zip(known, spreads, strict=True):
            low = y - spread if spread < y else y
            axes.update_datalim([(row.average_bits, y + spread), (row.average_bits, low)])


def _std(row: CompareRow) -> float:
    spread = row.frechet_ratio
    return 0.0 if spread is None or spread.std is None else spread.std


def _draw_root(
    axes: Axes, palette: Mapping[str, str], rows: Sequence[CompareRow], limits: Limits
) -> None:
    """Draw the configurations that the searches measured at the root."""
    points = [
        point
        for row in rows
        if row.strategy == TSS and row.variant == "ptq"
        for point in row.front
        if limits.low <= _bits(point) <= limits.high and point.mse > 0
    ]
    for kept, label in ((False, "dropped at the root of tss"), (True, "kept at the root of tss")):
        chosen = [point for point in points if point.kept == kept]
        if chosen:
            axes.plot(
                [_bits(point) for point in chosen],
                [point.mse for point in chosen],
                "o",
                markersize=3.4 if kept else 2.6,
                markerfacecolor=palette[OURS] if kept else "none",
                markeredgecolor=palette[OURS if kept else BASELINE],
                markeredgewidth=0.7,
                alpha=0.5 if kept else 0.8,
                label=label,
            )


def _bits(point: SearchPoint) -> float:
    return (point.weight_bits + point.activation_bits) / 2


def _draw_peers(
    axes: Axes,
    palette: Mapping[str, str],
    rows: Sequence[CompareRow],
    limits: Limits,
    value: Value,
) -> None:
    """Draw each peer with a marker of its own; one beyond the axis stands at its edge.

    Their names are in the legend: beside the markers they would run over lines and each other.
    """
    peers = [row for row in rows if row.peer]
    for index, row in enumerate(peers):
        y = value(row)
        if y is None:
            continue
        axes.plot(
            min(row.average_bits, limits.high),
            y,
            PEER_MARKERS[index % len(PEER_MARKERS)],
            linestyle="none",
            color=palette[INK],
            markersize=4.5,
            clip_on=False,
            label=f"{row.strategy}, {row.description}",
        )


def _make_logarithmic(axes: Axes) -> None:
    """Make the y axis logarithmic, with ticks in plain numbers: 1, 2, 5 or powers of ten only."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1.0, 2.0, 5.0) if high < _DECADES_FROM * low else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(base=10.0, subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _say_nothing_measured(axes: Axes, palette: Mapping[str, str]) -> None:
    axes.set_yticks([])
    axes.annotate(
        "not measured: the recipe names no classifier",
        (0.5, 0.5),
        xycoords="axes fraction",
        ha="center",
        color=palette[MUTED],
    )
