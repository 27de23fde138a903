"""The picture of load tests, by its pixels and its texts."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from treeq_export.client.loadtest_figure import (
    describe_record,
    draw_loadtest,
    draw_png,
    label_records,
)
from treeq_export.records.loadtest import (
    ClientCost,
    LoadLevel,
    LoadSetup,
    LoadTestRecord,
    MemoryTrace,
    ModelLoad,
    ServedModel,
)
from treeq_export.report.svg import ALARM, LIGHT, OURS, SECOND, THIRD


def make_model(name: str, *, merges: bool) -> ServedModel:
    return ServedModel(
        name=name,
        version="1",
        backend="python",
        max_batch=16,
        dynamic_batching=merges,
        queue_delay_us=100 if merges else 0,
        num_instances=1,
    )


def make_load(name: str, batch: float | None) -> ModelLoad:
    return ModelLoad(
        name=name,
        num_requests=100,
        num_failed=0,
        num_inferences=100,
        num_executions=0 if batch is None else round(100 / batch),
        average_batch=batch,
        total_ms=5.0,
        queue_ms=1.0,
        compute_ms=4.0,
    )


def make_level(concurrency: int, batch: float | None, **changes: Any) -> LoadLevel:
    level = LoadLevel(
        concurrency=concurrency,
        complete=True,
        duration_s=10.0,
        num_requests=100,
        num_errors=0,
        errors={},
        images_per_s=10.0 * concurrency,
        p50_ms=5.0 + concurrency,
        p90_ms=6.0 + concurrency,
        p95_ms=7.0 + concurrency,
        p99_ms=9.0 + concurrency,
        max_ms=20.0,
        latencies_ms=[5.0],
        models=[make_load("sampler", 1.0), make_load("denoiser", batch)],
        client=ClientCost(cpu_ms=0.3, cpu_share=0.01, outside_ms=0.5),
        memory=None,
    )
    return level.model_copy(update=changes)


def make_record(
    mode: str = "bls", *, merges: bool = True, levels: list[LoadLevel] | None = None, note: str = ""
) -> LoadTestRecord:
    return LoadTestRecord(
        setup=LoadSetup(
            url="http://127.0.0.1:8000",
            protocol="http",
            model="digits",
            mode=mode,
            target="ort",
            answers_inside=mode == "inprocess",
            models=[
                make_model("sampler", merges=merges and mode == "inprocess"),
                make_model("denoiser", merges=merges and mode == "bls"),
            ],
            config_sha256="0" * 64,
            output="image",
            steps=25,
            guidance=1.0,
            seed=0,
            duration_s=10.0,
            warmup_s=1.0,
            note=note,
        ),
        environment={"cpu": "a processor", "cores": 2, "load_average": [0.0, 0.0, 0.0]},
        levels=levels if levels is not None else [make_level(each, each / 2) for each in (1, 4, 8)],
    )


def pixels_of(png: bytes) -> dict[str, int]:
    """Count the pixels near each colour of the house."""
    with Image.open(io.BytesIO(png)) as image:
        rgb = np.asarray(image.convert("RGB"), np.int16)
    counts = {}
    for marker, color in LIGHT.items():
        wanted = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)])
        counts[marker] = int((np.abs(rgb - wanted).max(axis=-1) <= 6).sum())
    return counts


def texts_of(records: list[tuple[str, LoadTestRecord]]) -> list[str]:
    figure = Figure(layout="constrained")
    draw_loadtest(figure, LIGHT, records)
    figure.draw_without_rendering()
    texts = [text.get_text() for text in figure.findobj(mpl.text.Text)]  # pyright: ignore
    return [text for text in texts if text]


def test_one_record_in_its_colour() -> None:
    counts = pixels_of(draw_png([("", make_record())]))
    assert counts[OURS] > 500
    assert counts[SECOND] == counts[ALARM] == 0


def test_records_have_a_colour_each() -> None:
    faster = [make_level(each, 1.0, images_per_s=20.0 * each, p50_ms=2.0) for each in (1, 4, 8)]
    records = [("a", make_record("bls")), ("b", make_record("inprocess", levels=faster))]
    counts = pixels_of(draw_png(records))
    assert counts[OURS] > 200
    assert counts[SECOND] > 200
    assert counts[THIRD] == 0


def test_it_is_deterministic_and_leaves_matplotlib_as_it_was() -> None:
    before = dict(mpl.rcParams)
    first = draw_png([("", make_record())])
    assert draw_png([("", make_record())]) == first
    assert dict(mpl.rcParams) == before


def test_axes_name_what_they_show_and_what_was_emulated() -> None:
    texts = texts_of([("", make_record(note="ONNX Runtime's backend is emulated"))])
    for wanted in ("ms", "images per second", "rows per execution", "concurrent clients"):
        assert wanted in texts
    caption = next(text for text in texts if "digits, ort, 25 steps" in text)
    assert caption.splitlines() == [
        "digits, ort, 25 steps: clients over http, 10 s per level",
        "a processor, 2 cores; clients on the server's machine",
        "ONNX Runtime's backend is emulated",
    ]
    assert {"p50", "p90", "p99", "sampler", "denoiser"} <= set(texts)
    assert {"1", "4", "8"} <= set(texts)  # ticks at the levels


def test_a_model_that_is_never_executed_is_left_out() -> None:
    levels = [make_level(each, None) for each in (1, 2)]
    texts = texts_of([("", make_record("inprocess", levels=levels))])
    assert "sampler" in texts
    assert "denoiser" not in texts


def test_a_server_that_died_has_no_batches() -> None:
    levels = [make_level(1, 1.0, models=[], num_errors=7, p50_ms=None, p90_ms=None, p99_ms=None)]
    records = [("", make_record(levels=levels))]
    texts = texts_of(records)
    assert "the server did not say" in texts
    assert "7 failed" in texts
    assert pixels_of(draw_png(records))[ALARM] > 10


def test_memory_has_a_panel_of_its_own() -> None:
    trace = MemoryTrace(
        kind="own",
        seconds=[0.0, 1.0, 2.0, 3.0],
        bytes=[100_000_000, 101_000_000, 101_000_000, 103_000_000],
        pss_bytes=[],
        num_processes=[2, 2, 2, 2],
        slope_mb_per_min=60.0,
        growth_bytes=3e6,
        growth_fraction=0.03,
    )
    levels = [make_level(1, 1.0), make_level(8, 2.0, memory=trace)]
    with_memory, without = make_record(levels=levels), make_record("inprocess")
    texts = texts_of([("a", with_memory), ("b", without)])
    assert "+3.00 MB" in texts
    assert any(text.startswith("Memory of the server") and "8 clients" in text for text in texts)
    assert not any(text.startswith("Memory") for text in texts_of([("b", without)]))
    with Image.open(io.BytesIO(draw_png([("a", with_memory)]))) as image:
        tall = image.height
    with Image.open(io.BytesIO(draw_png([("b", without)]))) as image:
        assert image.height < tall


def test_one_more_panel_beside_memory() -> None:
    def draw(axes: Axes, colors: Sequence[str]) -> None:
        axes.bar([0, 1], [1.0, 2.0], color=list(colors)[::-1])
        axes.set_title("one more")

    records = [("a", make_record("bls")), ("b", make_record("inprocess"))]
    with Image.open(io.BytesIO(draw_png(records))) as image:
        plain = image.height
    png = draw_png(records, None, draw)
    with Image.open(io.BytesIO(png)) as image:
        assert image.height > plain
    assert pixels_of(png)[SECOND] > 2000  # a bar is more than lines


def test_labels() -> None:
    merged, single = make_record("bls"), make_record("inprocess", merges=False)
    assert label_records([("a", merged), ("b", single)]) == [
        "bls, dynamic batching of the denoiser (100 us)",
        "inprocess, no dynamic batching",
    ]
    assert label_records([("a", merged), ("b", merged)])[1].startswith("b: bls")


@pytest.mark.parametrize(("guidance", "shown"), [(1.0, "25 steps: "), (4.5, "guidance 4.5: ")])
def test_title(guidance: float, shown: str) -> None:
    record = make_record(note="emulated")
    setup = record.setup.model_copy(update={"guidance": guidance})
    title = describe_record(record.model_copy(update={"setup": setup}))
    assert shown in title
    assert title.endswith("http; emulated")
