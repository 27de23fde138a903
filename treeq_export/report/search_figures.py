"""Plots of search and finetune: the front at the root, the loss along training."""

# matplotlib's stubs leave its **kwargs untyped.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from treeq_export.records import FinetuneRecord, SearchPoint, SearchRecord
from treeq_export.report.svg import ALARM, BASELINE, INK, MUTED, OURS, SECOND, make_panels, to_svg


class BudgetAxis(NamedTuple):
    """What a front is drawn over.

    Attributes:
        label: Label of the axis.
        limit: End of the budget; None without one.
        fields: Fields of a point; their mean is its place.
        unit: Divides the place.
    """

    label: str
    limit: float | None
    fields: tuple[str, ...]
    unit: float = 1.0

    def place(self, point: SearchPoint) -> float:
        """Return a point's place on the axis."""
        return sum(getattr(point, name) for name in self.fields) / len(self.fields) / self.unit


def choose_axis(record: SearchRecord) -> BudgetAxis:
    """Return the axis that shows the budget: bytes, or the bits that have a limit."""
    weight = record.budget.get("weight_bits")
    activation = record.budget.get("activation_bits")
    if weight is not None and activation is None:
        return BudgetAxis("average weight bits", weight, ("weight_bits",))
    if activation is not None and weight is None:
        return BudgetAxis("average activation bits", activation, ("activation_bits",))
    size = record.budget.get("size_bytes")
    if size is not None and weight is None:
        return BudgetAxis("megabytes of quantized layers", size / 1e6, ("size_bytes",), 1e6)
    limit = None if weight is None or activation is None else (weight + activation) / 2
    label = "average bits, mean of weights and activations"
    return BudgetAxis(label, limit, ("weight_bits", "activation_bits"))


def draw_front(record: SearchRecord) -> str:
    """Draw the configurations that were measured at the root.

    Args:
        record: With a front.

    Returns:
        SVG text: kept as dots, dropped as circles, the chosen one ringed, the budget as a line.
    """

    def draw(figure: Figure) -> None:
        (axes,) = make_panels(figure, 1)
        axis = choose_axis(record)
        points = [point for point in record.front if point.mse > 0]
        dropped = [point for point in points if not point.kept]
        kept = sorted((point for point in points if point.kept), key=axis.place)
        chosen = [point for point in points if point.chosen]
        _scatter(axes, axis, dropped, "dropped", "o", 4.0, "none", BASELINE)
        _scatter(axes, axis, kept, "kept", "o", 5.0, OURS, OURS)
        _scatter(axes, axis, chosen, "chosen", "o", 11.0, "none", ALARM)
        if axis.limit is not None:
            axes.axvline(axis.limit, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
            axes.annotate(
                "budget",
                (axis.limit, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(4, -10),
                textcoords="offset points",
                color=MUTED,
                fontsize=8,
            )
        scale_logarithmic(axes)
        axes.set_xlabel(axis.label)
        axes.set_ylabel("network MSE on search inputs")
        axes.legend(loc="upper right", fontsize=8)

    return to_svg("front", 3.9, draw)


def _scatter(
    axes: Axes,
    axis: BudgetAxis,
    points: Sequence[SearchPoint],
    label: str,
    marker: str,
    size: float,
    face: str,
    edge: str,
) -> None:
    axes.plot(
        [axis.place(point) for point in points],
        [point.mse for point in points],
        marker,
        markersize=size,
        markerfacecolor=face,
        markeredgecolor=edge,
        markeredgewidth=1.6 if size > 10 else 0.8,
        label=f"{label}, {len(points)}" if len(points) > 1 else label,
    )


def scale_logarithmic(axes: Axes) -> None:
    """Make the y axis logarithmic, with ticks at 1, 2 and 5 times powers of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10.0, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(_format_tick))
    axes.yaxis.set_minor_locator(NullLocator())


def _format_tick(tick: float, _: int | None) -> str:
    return f"{tick:g}"


def draw_training(record: FinetuneRecord) -> str:
    """Draw the losses along training, and the network's error on held-out inputs below.

    Args:
        record: With a curve.

    Returns:
        SVG text; a line marks the step whose tensors were kept.
    """

    def draw(figure: Figure) -> None:
        above, below = make_panels(figure, 2)
        trained = [p for p in record.curve if p.train_loss is not None]
        above.plot(
            [p.step for p in trained],
            [p.train_loss or 0.0 for p in trained],
            color=SECOND,
            linewidth=1.3,
            label="training loss",
        )
        steps = [p.step for p in record.curve]
        above.plot(
            steps, [p.held_out_loss for p in record.curve], color=OURS, label="held-out loss"
        )
        below.plot(steps, [p.held_out_mse for p in record.curve], color=OURS, marker="o", ms=3)
        above.set_ylabel("distillation loss")
        below.set_ylabel("network MSE, held out")
        below.set_xlabel("optimizer steps")
        for axes in (above, below):
            axes.axvline(record.best_step, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
            axes.set_ylim(bottom=0)
        above.legend(loc="lower left", fontsize=8)

    return to_svg("training", 4.6, draw)
