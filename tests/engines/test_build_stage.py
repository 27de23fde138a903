"""The build stage on the digits sample: engines for three GPUs, cache, interruption, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result

from tests.run_records import record_again
from treeq_export.cli import main
from treeq_export.engines import BuildOptions, run_build
from treeq_export.errors import PlanError, RecipeError, RunnerError
from treeq_export.plan import load_plan
from treeq_export.recipe import CompileSection
from treeq_export.records import load_record
from treeq_export.records.build import BuildRecord, EngineManifest, VerifierTable
from treeq_export.targets.names import ENGINES

GPUS = ("sm_80", "sm_89", "sm_120")
ENGINE = Path("engines/tensorrt-rtx/tensorrt/sm_89")


def invoke(run: Path, *args: str) -> Result:
    base = ["build", "--run", str(run), "--runtime", "tensorrt-rtx"]
    return CliRunner().invoke(main, [*base, *args], env={"COLUMNS": "200"})


def build_quick(run: Path, cache: Path | None = None, gpu: str = "sm_89") -> BuildRecord:
    options = BuildOptions("tensorrt-rtx", (gpu,), ("tensorrt",), cache)
    return run_build(run, options, CompileSection(max_batch=8), lambda *_: lambda _: None)


@pytest.fixture(scope="session")
def built_run(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the plugin engine for sm_89, and its cache. Read-only."""
    run = tmp_path_factory.mktemp("built") / "run"
    shutil.copytree(digits_run, run)
    build_quick(run)
    return run


@pytest.fixture
def built(built_run: Path, tmp_path: Path) -> Path:
    """A copy of `built_run` to change; hard links of the cache are copies in it."""
    return Path(shutil.copytree(built_run, tmp_path / "built"))


@pytest.mark.slow
def test_every_quantized_layer_of_six_engines_is_a_plugin_or_an_int8_gemm(copied_run: Path):
    result = invoke(copied_run, "--gpu", ",".join(GPUS), "--json")
    assert result.exit_code == 0, result.stderr
    record = BuildRecord.model_validate_json(result.stdout)
    expected = [f"engines/tensorrt-rtx/{t}/{gpu}" for t in ENGINES for gpu in GPUS]
    assert [engine.path for engine in record.engines] == expected
    names = [layer.name for layer in load_plan(copied_run).layers]
    for engine in record.engines:
        folder = copied_run / engine.path
        manifest = load_record(folder / "manifest.json", EngineManifest, "build")
        table = load_record(folder / "layers.json", VerifierTable, "build")
        assert manifest == engine.manifest
        assert [layer.name for layer in table.layers] == names
        assert all(layer.passed for layer in table.layers)
        became = {layer.became for layer in table.layers}
        assert became == ({"plugin"} if manifest.target == "tensorrt" else {"int8 gemm"})
        assert table.summary.passed_fraction == 1.0
        assert (folder / "model.engine").stat().st_size == manifest.engine_bytes
        assert manifest.bits[names[0]] == (4, 4)
        assert manifest.profile["sample"].max[0] == 8
    assert load_record(copied_run / "build.json", BuildRecord, "build") == record
    assert not list(copied_run.rglob("*.partial*"))


def test_the_manifest_names_the_plugins_and_what_the_engine_was_made_of(built_run: Path):
    manifest = load_record(built_run / ENGINE / "manifest.json", EngineManifest, "build")
    plugins = [(p.namespace, p.name, p.version) for p in manifest.plugins]
    assert plugins == [("treeq", "Monarch", "1"), ("treeq", "QLinear", "1")]
    assert manifest.gpu == "sm_89"
    compiled = json.loads((built_run / "compile.json").read_text())["targets"][0]
    assert manifest.graph_sha256 == compiled["sha256"]
    assert manifest.peak_bytes > 50e6
    assert manifest.build_s > 0


def test_a_second_call_builds_nothing(built: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("treeq_export.engines.cache.build_engine", must_not_build)
    times = {path: path.stat().st_mtime_ns for path in built.rglob("*") if path.is_file()}
    record = build_quick(built)
    assert [engine.how for engine in record.engines] == ["up to date"]
    times.pop(built / "build.json")
    assert all(path.stat().st_mtime_ns == when for path, when in times.items())


def test_what_a_killed_build_left_is_removed_where_nothing_is_written(built: Path):
    parents = (built / "engines" / "cache", (built / ENGINE).parent)
    left = [parent / ".treeq-1-killed.partial" for parent in parents]
    for folder in left:
        folder.mkdir()
    assert [engine.how for engine in build_quick(built).engines] == ["up to date"]
    assert not any(folder.exists() for folder in left)


def must_not_build(*_: object) -> None:
    pytest.fail("an engine was built")


def test_the_cache_gives_an_engine_back(built: Path, monkeypatch: pytest.MonkeyPatch):
    before = (built / ENGINE / "manifest.json").read_bytes()
    shutil.rmtree(built / ENGINE)
    monkeypatch.setattr("treeq_export.engines.cache.build_engine", must_not_build)
    assert [engine.how for engine in build_quick(built).engines] == ["from cache"]
    assert (built / ENGINE / "manifest.json").read_bytes() == before


def test_runs_share_a_cache(built: Path, copied_run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("treeq_export.engines.cache.build_engine", must_not_build)
    record = build_quick(copied_run, cache=built / "engines" / "cache")
    assert [engine.how for engine in record.engines] == ["from cache"]


@pytest.mark.parametrize("change", ["engine", "cache", "entry", "other graph", "other gpu"])
def test_a_change_means_a_build(built: Path, monkeypatch: pytest.MonkeyPatch, change: str):
    calls: list[str] = []

    def note(order: Any, expected_s: float | None, _on_step: object) -> None:
        calls.append(order.gpu)
        assert (expected_s is None) == (change in ("other graph", "entry"))
        raise RunnerError("far enough")

    monkeypatch.setattr("treeq_export.engines.cache.build_engine", note)
    for engine in built.rglob("model.engine"):
        if change == "engine" or (change == "cache" and "cache" in engine.parts):
            engine.write_bytes(engine.read_bytes()[:-1])
    if change in ("cache", "entry"):
        shutil.rmtree(built / ENGINE)
    if change == "entry":
        [entry] = built.rglob("entry.json")
        entry.write_text(entry.read_text().replace('"num_layers": ', '"num_layers": 1'))
    if change == "other graph":
        path = built / "onnx/tensorrt/model.onnx"
        model = onnx.load(path)
        model.doc_string = "changed"
        onnx.save(model, path)
    with pytest.raises(RunnerError, match="far enough"):
        build_quick(built, gpu="sm_86" if change == "other gpu" else "sm_89")
    assert calls == ["sm_86" if change == "other gpu" else "sm_89"]
    assert not list(built.rglob("*.partial*"))


def test_a_changed_table_is_made_again(built: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("treeq_export.engines.cache.build_engine", must_not_build)
    table = built / ENGINE / "layers.json"
    before = table.read_text()
    table.write_text(before.replace('"passed": true', '"passed": false', 1))
    result = invoke(built, "--gpu", "sm_89", "--target", "tensorrt")
    assert result.exit_code == 0, result.stderr
    assert f"{table.parent}: damaged" in result.stderr
    assert table.read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["parent", "child"])
def test_a_killed_build_leaves_nothing_and_goes_on(copied_run: Path, killed: str):
    words = f"build --run {copied_run} --runtime tensorrt-rtx --gpu sm_89 --target tensorrt"
    process = subprocess.Popen(
        [sys.executable, "-m", "treeq_export.cli", *words.split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    child = wait_for_child(process.pid, "treeq_export.engines.child")
    os.kill(process.pid if killed == "parent" else child, signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    wait_for(lambda: not Path(f"/proc/{child}").exists() or is_zombie(child))
    assert not list(copied_run.rglob("model.engine"))
    assert not (copied_run / "build.json").exists()
    if killed == "child":
        assert process.returncode == 1
        assert "the builder was killed" in stderr.splitlines()[-1]
    result = invoke(copied_run, "--gpu", "sm_89", "--target", "tensorrt", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["engines"][0]["how"] == "built"
    assert not list(copied_run.rglob("*.partial*"))


def wait_for(condition: Callable[[], Any], timeout_s: float = 60) -> Any:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise TimeoutError


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def wait_for_child(pid: int, module: str) -> int:
    def find() -> int | None:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in task.read_text().split():
                if module in Path(f"/proc/{child}/cmdline").read_text():
                    return int(child)
        return None

    return wait_for(find)


def test_an_engine_that_disobeys_the_plan_is_not_kept(built: Path):
    """The plan says that a layer's activation is not quantized; the graph says it is."""
    import hashlib

    plan = json.loads((built / "plan.json").read_text())
    name = plan["layers"][0]["name"]
    plan["layers"][0]["activation"] = {"bits": None, "scale": "none"}
    (built / "plan.json").write_text(json.dumps(plan, indent=2, ensure_ascii=False) + "\n")
    path = built / "onnx/tensorrt/model.onnx"
    model = onnx.load(path)
    digest = hashlib.sha256((built / "plan.json").read_bytes()).hexdigest()
    for entry in model.metadata_props:
        if entry.key == "treeq.plan_sha256":
            entry.value = digest
    onnx.save(model, path)
    record_again(built)
    record_again(built, "calibrate")
    shutil.rmtree(built / "engines")
    result = invoke(built, "--gpu", "sm_89", "--target", "tensorrt")
    assert result.exit_code == 1
    assert f"{name} (weight-only) became plugin" in result.stderr
    assert not (built / ENGINE).exists()


def test_a_graph_of_another_plan_is_refused(copied_run: Path):
    plan = json.loads((copied_run / "plan.json").read_text())
    plan["layers"][0]["weight"]["bits"] = 3
    (copied_run / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(PlanError, match=r"another plan.*treeq-export compile"):
        build_quick(copied_run)


def test_a_graph_that_is_not_parsed_is_one_line(copied_run: Path):
    path = copied_run / "onnx/tensorrt/model.onnx"
    model = onnx.load(path)
    model.graph.node[0].op_type = "BitShift"
    onnx.save(model, path)
    record_again(copied_run)
    result = invoke(copied_run, "--gpu", "sm_89", "--target", "tensorrt")
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert "builds no engine for sm_89" in last
    assert "BitShift" in last
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["--gpu", "sm_90"], 1, "no build for Hopper"),
        (["--gpu", "sm_70"], 1, "sm_75, sm_80"),
        (["--gpu", "ada"], 1, "such as sm_80"),
        (["--gpu", ","], 1, "received nothing"),
        (["--gpu", "sm_89", "--target", "ort"], 1, "expected one of tensorrt, tensorrt-native"),
        ([], 2, "--gpu"),
    ],
)
def test_wrong_options_are_one_line(digits_run: Path, args: list[str], status: int, words: str):
    result = invoke(digits_run, *args)
    assert result.exit_code == status
    assert words in result.stderr.splitlines()[-1]


def test_tensorrt_builds_for_the_own_gpu_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("treeq_export.engines.options.own_gpu", lambda: "sm_80")
    BuildOptions("tensorrt", ("sm_80",)).check()
    with pytest.raises(RunnerError, match=r"own GPU only, which is sm_80\. Build on .* with sm_89"):
        BuildOptions("tensorrt", ("sm_89",)).check()


def test_an_unknown_runtime_is_refused():
    runtime: Any = "openvino"
    with pytest.raises(RecipeError, match="expected one of tensorrt, tensorrt-rtx"):
        BuildOptions(runtime, ("sm_80",)).check()


def test_a_run_without_compiled_targets_says_what_to_do(copied_run: Path):
    shutil.rmtree(copied_run / "onnx" / "tensorrt")
    with pytest.raises(PlanError, match=r"tensorrt is not compiled.*compile\.targets"):
        build_quick(copied_run)


def test_the_table_is_printed(built: Path):
    result = invoke(built, "--gpu", "sm_89", "--target", "tensorrt")
    assert result.exit_code == 0, result.stderr
    assert "42 (100%)" in result.stdout
    assert "up to date" in result.stdout
