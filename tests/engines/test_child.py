"""What the building process does, here in the test's own process, and how its end is told."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from treeq_export.engines import child, engine
from treeq_export.engines.engine import BuildOrder, BuildResult, build_engine
from treeq_export.engines.graph_facts import read_facts
from treeq_export.errors import RunnerError
from treeq_export.runners.tensorrt_library import Runtime, load_runtime, require_parser
from treeq_export.runners.tensorrt_plugin import register_plugins


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "1")
    runtime = load_runtime("tensorrt-rtx")
    require_parser(runtime)
    register_plugins(runtime)
    return runtime


@pytest.fixture
def order(make_graph: Any, tmp_path: Path) -> BuildOrder:
    graph = make_graph("fc", rows=None)
    graph.plugin_layer("fc")
    path = graph.save()
    facts = read_facts(path, max_batch=8)
    assert facts.profile["x"].max == [8, 64]
    folder = tmp_path / "out"
    folder.mkdir()
    return BuildOrder(
        runtime="tensorrt-rtx",
        gpu="sm_120",
        graph=str(path),
        profile=facts.profile,
        folder=str(folder),
    )


# Polygraphy sets a timing cache, which this version of TensorRT-RTX calls deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_engine_layers_and_result_are_left_in_the_folder(order: BuildOrder, runtime: Runtime):
    fractions: list[float] = []
    channel: Any = SimpleNamespace(report=fractions.append)
    child.build(order, runtime, channel)
    folder = Path(order.folder)
    result = BuildResult.model_validate_json((folder / "build.json").read_bytes())
    assert (folder / "model.engine").stat().st_size > 3 * 64 * 32 / 8
    assert "LayerType: custom_layer" in (folder / "layers.txt").read_text()
    assert result.num_layers == 3  # two constants and the plugin
    assert result.build_s > 0
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] <= 1


def test_a_graph_that_is_no_graph_is_named(order: BuildOrder, runtime: Runtime):
    Path(order.graph).write_bytes(b"no graph")
    channel: Any = SimpleNamespace(report=lambda _: None)
    with pytest.raises(
        RunnerError, match=r"model\.onnx: tensorrt-rtx .* builds no engine for sm_120"
    ):
        child.build(order, runtime, channel)


def test_the_layers_of_tensorrt_come_from_the_inspector():
    """A stand-in: TensorRT itself needs a GPU for this."""
    inspector = SimpleNamespace(get_engine_information=lambda form: f"{form} of layers")
    loaded: list[Any] = [SimpleNamespace(create_engine_inspector=lambda: inspector), None]
    trt = SimpleNamespace(
        Runtime=lambda _: SimpleNamespace(deserialize_cuda_engine=lambda _: loaded.pop(0)),
        LayerInformationFormat=SimpleNamespace(JSON="JSON"),
    )
    assert child._inspect(trt, None, b"") == "JSON of layers"
    with pytest.raises(RunnerError, match="cannot be loaded again"):
        child._inspect(trt, None, b"")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed, most likely for want"),
        ("import os; os.write(2, b'terminate\\n'); os.abort()", r"crashed \(SIGABRT\): terminate"),
        ("raise SystemExit('no such thing')", "status 1: no such thing .*doctor"),
        ("", "status 0: no message"),
        ('print(\'{"error": "own words"}\', flush=True); raise SystemExit(1)', "^own words$"),
    ],
)
def test_every_end_is_one_line(
    order: BuildOrder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, words: str
):
    (tmp_path / "out" / "fake_child.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "out"))
    monkeypatch.setattr(engine, "_CHILD", "fake_child")
    with pytest.raises(RunnerError, match=words) as error:
        build_engine(order, None, lambda _: None)
    assert "\n" not in str(error.value)


def test_progress_rises_to_one(order: BuildOrder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    lines = "\\n".join(f'{{"fraction": {f}}}' for f in (0.25, 0.5, 0.75))
    result = BuildResult(build_s=1, peak_bytes=2, num_layers=3)
    code = (
        f"print('''{lines}''')\nopen('build.json', 'w').write('''{result.model_dump_json()}''')\n"
    )
    (tmp_path / "out" / "fake_child.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "out"))
    monkeypatch.setattr(engine, "_CHILD", "fake_child")
    steps: list[float] = []
    assert build_engine(order, None, steps.append) == result
    assert steps == sorted(steps)
    assert steps[-2:] == [0.75, 1.0]
