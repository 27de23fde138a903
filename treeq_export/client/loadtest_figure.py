"""The picture of one or several load tests: latency, throughput and batches over concurrency.

A record has one colour in all panels; in the first the line says which percentile it is, in the
third which model. Where memory was sampled, a panel below shows it over the time of the level with
the most clients.
"""

# matplotlib's stubs leave its **kwargs untyped.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from treeq_export.records.loadtest import LoadLevel, LoadSetup, LoadTestRecord, ServedModel
from treeq_export.report.svg import ALARM, BASELINE, INK, MUTED, OURS, SECOND, THIRD, to_png

PANELS_IN = 4.6
MEMORY_IN = 2.4
COLORS = (OURS, SECOND, THIRD, BASELINE, INK, MUTED)
SOLID, DASHED, DOTTED = "-", (0, (5, 2)), (0, (1, 1.5))
_LOCAL = ("localhost", "127.0.0.1", "::1")

Named = Sequence[tuple[str, LoadTestRecord]]
Beside = Callable[[Axes, Sequence[str]], None]


def describe_batching(model: ServedModel) -> str:
    """Return in a few words whether Triton merges a model's requests."""
    if not model.dynamic_batching:
        return "no dynamic batching"
    return f"dynamic batching of the {model.name} ({model.queue_delay_us} us)"


def describe_setup(setup: LoadSetup) -> str:
    """Return what tells a served repository from another: mode and batching."""
    merging = [model for model in setup.models if model.dynamic_batching] or setup.models[:1]
    return f"{setup.mode}, {describe_batching(merging[0])}"


def describe_record(record: LoadTestRecord) -> str:
    """Return what was loaded, in one line."""
    setup = record.setup
    guided = "" if setup.guidance == 1.0 else f", guidance {setup.guidance:g}"
    note = f"; {setup.note}" if setup.note else ""
    return (
        f"{setup.model}, {setup.target}, {setup.steps} steps{guided}: {describe_setup(setup)}, "
        f"{setup.protocol}{note}"
    )


def label_records(records: Named) -> list[str]:
    """Return a label for each record: its mode and batching, and its name where those are equal.

    Args:
        records: A name and a record each.
    """
    labels = [describe_setup(record.setup) for _, record in records]
    return [
        f"{name}: {label}" if labels.count(label) > 1 and name else label
        for (name, _), label in zip(records, labels, strict=True)
    ]


def draw_png(records: Named, memory: Named | None = None, beside: Beside | None = None) -> bytes:
    """Return the picture as a PNG file.

    Args:
        records: A name, shown where records are of equal setups, and a record each.
        memory: Records of the same number and order whose memory is shown, if other ones.
        beside: Draws one more panel, beside memory's, with a colour for each record.
    """
    below = bool(_traces(memory or records)) or beside is not None
    height = PANELS_IN + (MEMORY_IN if below else 0.0)
    return to_png(
        height, lambda figure, palette: draw_loadtest(figure, palette, records, memory, beside)
    )


def draw_loadtest(
    figure: Figure,
    palette: Mapping[str, str],
    records: Named,
    memory: Named | None = None,
    beside: Beside | None = None,
) -> None:
    """Draw all panels.

    Args:
        figure: Figure to draw on.
        palette: The colour to use for each marker colour.
        records: A name and a record each.
        memory: See `draw_png`.
        beside: See `draw_png`.
    """
    traces = _traces(memory or records)
    heights = [PANELS_IN, MEMORY_IN] if traces or beside else [PANELS_IN]
    grid = figure.add_gridspec(len(heights), 6, height_ratios=heights)
    panels = [figure.add_subplot(grid[0, at : at + 2]) for at in (0, 2, 4)]
    colors = [palette[COLORS[at % len(COLORS)]] for at in range(len(records))]
    _draw_latency(panels[0], palette, records, colors)
    _draw_lines(panels[1], records, colors, lambda level: level.images_per_s, SOLID)
    panels[1].set_title("Throughput")
    panels[1].set_ylabel("images per second")
    _draw_batches(panels[2], palette, records, colors)
    levels = sorted({level.concurrency for _, record in records for level in record.levels})
    for axes in panels:
        _make_client_axis(axes, levels)
    if traces:
        _draw_memory(figure.add_subplot(grid[1, :3] if beside else grid[1, :]), traces, colors)
    if beside is not None:
        beside(figure.add_subplot(grid[1, 3:] if traces else grid[1, :]), colors)
    _mark_errors(panels[1], palette, records)
    handles = [Line2D([], [], color=color, marker="o", markersize=4) for color in colors]
    figure.legend(handles, label_records(records), loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(_caption([record for _, record in records]), x=0.008, ha="left", fontsize=9)


def _caption(records: Sequence[LoadTestRecord]) -> str:
    """Return what was loaded, where, and what was emulated."""
    first, setup = records[0], records[0].setup
    models = dict.fromkeys(
        f"{each.setup.model}, {each.setup.target}, {each.setup.steps} steps" for each in records
    )
    protocols = "/".join(dict.fromkeys(each.setup.protocol for each in records))
    place = "clients on the server's machine" if _is_local(setup) else "clients elsewhere"
    environment = first.environment
    lines = [
        f"{'; '.join(models)}: clients over {protocols}, {setup.duration_s:g} s per level",
        f"{environment.get('cpu')}, {environment.get('cores')} cores; {place}",
        *dict.fromkeys(each.setup.note for each in records if each.setup.note),
    ]
    return "\n".join(lines)


def _is_local(setup: LoadSetup) -> bool:
    return urlsplit(setup.url).hostname in _LOCAL


def _draw_latency(
    axes: Axes, palette: Mapping[str, str], records: Named, colors: Sequence[str]
) -> None:
    """Draw three percentiles of one record, two where several share the panel."""
    styles: dict[str, Any] = {"p50": SOLID, "p90": DASHED, "p99": DOTTED}
    if len(records) > 1:
        del styles["p90"]
    for name, style in styles.items():
        _draw_lines(axes, records, colors, _percentile(name), style)
    _name_styles(axes, palette, styles)
    axes.set_title("Latency of a request of one image")
    axes.set_ylabel("ms")


def _percentile(name: str) -> Callable[[LoadLevel], float | None]:
    return lambda level: getattr(level, f"{name}_ms")


def _draw_batches(
    axes: Axes, palette: Mapping[str, str], records: Named, colors: Sequence[str]
) -> None:
    """Draw the average batch of every model that was executed."""
    names = dict.fromkeys(
        model.name
        for _, record in records
        for level in record.levels
        for model in level.models
        if model.average_batch is not None
    )
    styles = dict(zip(names, (SOLID, DASHED), strict=False))
    for name, style in styles.items():
        _draw_lines(axes, records, colors, _batch_of(name), style)
    if not styles:
        axes.annotate(
            "the server did not say",
            (0.5, 0.5),
            xycoords="axes fraction",
            ha="center",
            color=palette[MUTED],
        )
    _name_styles(axes, palette, styles)
    axes.set_title("Average batch")
    axes.set_ylabel("rows per execution")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))


def _batch_of(name: str) -> Callable[[LoadLevel], float | None]:
    return lambda level: next(
        (model.average_batch for model in level.models if model.name == name), None
    )


def _draw_lines(
    axes: Axes,
    records: Named,
    colors: Sequence[str],
    value: Callable[[LoadLevel], float | None],
    style: Any,
) -> None:
    """Draw a value over the number of clients, a line per record, where it is known."""
    for (_, record), color in zip(records, colors, strict=True):
        known = [
            (level.concurrency, y) for level in record.levels if (y := value(level)) is not None
        ]
        if known:
            axes.plot(
                [clients for clients, _ in known],
                [y for _, y in known],
                color=color,
                linestyle=style,
                marker="o",
                markersize=4.0,
                linewidth=1.5,
            )


def _name_styles(axes: Axes, palette: Mapping[str, str], styles: Mapping[str, Any]) -> None:
    handles = [Line2D([], [], color=palette[MUTED], linestyle=style) for style in styles.values()]
    if handles:
        axes.legend(handles, list(styles), loc="upper left", fontsize=8)


def _make_client_axis(axes: Axes, levels: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(levels))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(levels[0] / 1.25, levels[-1] * 1.25)
    axes.set_xlabel("concurrent clients")
    axes.set_ylim(bottom=0.0, top=axes.get_ylim()[1] * 1.12)


def _mark_errors(axes: Axes, palette: Mapping[str, str], records: Named) -> None:
    """Write the number of failed requests beside each level that has some."""
    for _, record in records:
        for level in record.levels:
            if level.num_errors:
                axes.annotate(
                    f"{level.num_errors} failed",
                    (level.concurrency, level.images_per_s),
                    xytext=(0, 6),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=palette[ALARM],
                )


def _traces(records: Named) -> list[LoadLevel | None]:
    """Return each record's level with the most clients whose memory was sampled; [] without any."""
    found = [
        max(
            (level for level in record.levels if level.memory and level.memory.bytes),
            key=lambda level: level.concurrency,
            default=None,
        )
        for _, record in records
    ]
    return found if any(found) else []


def _draw_memory(axes: Axes, levels: Sequence[LoadLevel | None], colors: Sequence[str]) -> None:
    """Draw the server's memory over time, and write its growth in the line's colour."""
    shown = [
        (level, level.memory, color)
        for level, color in zip(levels, colors, strict=True)
        if level is not None and level.memory is not None
    ]
    for place, (_, memory, color) in enumerate(shown):
        sizes = [size / 1e6 for size in memory.bytes]
        axes.plot(memory.seconds, sizes, color=color, linewidth=1.3)
        if memory.growth_bytes is not None:
            axes.annotate(
                f"{memory.growth_bytes / 1e6:+.2f} MB",
                (0.02, 0.06 + 0.13 * place),
                xycoords="axes fraction",
                fontsize=8,
                color=color,
            )
    what = "RSS" if any(memory.kind == "rss" for _, memory, _ in shown) else "without files' pages"
    most = "/".join(dict.fromkeys(str(level.concurrency) for level, _, _ in shown))
    axes.set_title(
        f"Memory of the server and its models, {most} clients ({what});\n"
        "written: median of the last quarter less that of the first"
    )
    axes.set_ylabel("MB")
    axes.set_xlabel("seconds")
    axes.set_ylim(bottom=0.0, top=axes.get_ylim()[1] * 1.1)
