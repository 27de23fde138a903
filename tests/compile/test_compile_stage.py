import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.hand_layers import lower
from treeq_export.artefacts import sha256_of_file
from treeq_export.compile.export import export_graph
from treeq_export.compile.stage import (
    compile_target,
    run_compile,
    save_model,
)
from treeq_export.errors import CompileError
from treeq_export.recipe import CompileSection
from treeq_export.records import CompileRecord, load_record
from treeq_export.run_folder import RunFolder
from treeq_export.runners.graph_file import initializer_bytes
from treeq_export.runners.graph_meta import PLAN_KEY
from treeq_export.runners.ort_runner import OrtRunner
from treeq_export.targets.target import Target

Make = Callable[..., Any]
TARGETS = ["portable", "ort"]


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def compile_again(tiny: Any, exported: ir.Model, run: Path, target: str, **changes: Any) -> Any:
    section = CompileSection(external_data=changes.pop("external_data", "auto"))
    arguments = {"plan": tiny.plan, "tensors": tiny.tensors, "section": section} | changes
    return compile_target(run, exported.clone(), target, **arguments)


def test_record_says_what_was_written(compiled_dit: Any):
    run = compiled_dit.run
    record = load_record(run / "compile.json", CompileRecord, "compile")
    assert [entry.target for entry in record.targets] == [*TARGETS, "fp32"]
    layers = [layer.name for layer in compiled_dit.plan.layers]
    for entry in record.targets:
        path = run / entry.path
        assert path == run / RunFolder.graph(entry.target)
        assert entry.sha256 == sha256_of_file(path)
        assert entry.size_bytes == sum(file.stat().st_size for file in path.parent.iterdir())
        assert [layer.name for layer in entry.audit] == ([] if entry.target == "fp32" else layers)
        assert all(layer.integer and not layer.weight_only for layer in entry.audit)
    assert not list(run.rglob("*.partial*"))


def test_graph_names_its_plan(compiled_dit: Any):
    digest = hashlib.sha256((compiled_dit.run / RunFolder.PLAN).read_bytes()).hexdigest()
    for target in (*TARGETS, "fp32"):
        metadata = ir.load(compiled_dit.run / RunFolder.graph(target)).metadata_props
        assert metadata[PLAN_KEY] == digest
        assert metadata["treeq.target"] == target
        assert set(metadata) - {"treeq.layers"} == {PLAN_KEY, "treeq.target"}


def test_packed_weights_cost_their_bits(compiled_dit: Any):
    graph = ir.load(compiled_dit.run / RunFolder.graph("ort")).graph
    planes = [v.const_value.nbytes for k, v in graph.initializers.items() if k.endswith("planes")]
    weights = sum(layer.num_weights for layer in compiled_dit.plan.layers)
    assert sum(planes) == weights * 4 // 8
    quantized = [
        value.const_value.nbytes
        for name, value in ir.load(
            compiled_dit.run / RunFolder.graph("portable")
        ).graph.initializers.items()
        if name.endswith("weight_quantized")
    ]
    assert sum(quantized) == weights * 4 // 8
    # Full-precision weights are gone from both, and planes from the portable graph.
    record = load_record(compiled_dit.run / "compile.json", CompileRecord, "compile")
    portable, ort, fp32 = (entry.size_bytes for entry in record.targets)
    assert max(portable, ort) < fp32 - weights * 2


@pytest.fixture(scope="module")
def second_export(compiled_dit: Any) -> ir.Model:
    """An export that the cache knows nothing of."""
    return export_graph(compiled_dit.quantized(), compiled_dit.recipe.compile.max_batch)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_second_export_gives_the_same_bytes(
    target: str, compiled_dit: Any, second_export: ir.Model, tmp_path: Path
):
    first = compile_again(compiled_dit, second_export, tmp_path / "again", target)
    assert files_below(tmp_path / "again/onnx") == {
        f"{target}/model.onnx": (compiled_dit.run / RunFolder.graph(target)).read_bytes()
    }
    record = load_record(compiled_dit.run / "compile.json", CompileRecord, "compile")
    [original] = [entry for entry in record.targets if entry.target == target]
    assert first == original


@pytest.mark.parametrize("target", TARGETS)
def test_external_data_moves_with_its_folder(
    target: str,
    compiled_dit: Any,
    exported_dit: ir.Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    run = tmp_path / "run"
    entry = compile_again(compiled_dit, exported_dit, run, target, external_data="always")
    folder = run / "onnx" / target
    assert {file.name for file in folder.iterdir()} == {"model.onnx", "model.onnx.data"}
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert entry.size_bytes == sum(sizes.values())
    assert sizes["model.onnx.data"] > 0.5 * entry.size_bytes
    assert entry.data_sha256 == sha256_of_file(folder / "model.onnx.data")
    moved = folder.rename(tmp_path / "elsewhere")
    elsewhere = tmp_path / "empty"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    inputs = compiled_dit.denoiser.make_example_inputs(2, seed=0)
    relative = Path(os.path.relpath(moved / "model.onnx", elsewhere))
    with (
        OrtRunner(relative, threads=1) as runner,
        OrtRunner(compiled_dit.run / RunFolder.graph(target), threads=1) as single,
    ):
        np.testing.assert_array_equal(runner.run(inputs), single.run(inputs))


def test_small_models_stay_one_file(compiled_dit: Any):
    for target in (*TARGETS, "fp32"):
        folder = (compiled_dit.run / RunFolder.graph(target)).parent
        assert [file.name for file in folder.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("target", TARGETS)
def test_failed_audit_leaves_the_old_graph(
    target: str, compiled_dit: Any, exported_dit: ir.Model, tmp_path: Path
):
    old = tmp_path / "onnx" / target
    old.mkdir(parents=True)
    (old / "model.onnx").write_bytes(b"old graph")
    before = files_below(tmp_path)
    name = compiled_dit.plan.layers[3].name
    key = f"{name}.codes"
    tampered = compiled_dit.tensors | {key: -1 - compiled_dit.tensors[key]}
    with pytest.raises(CompileError, match=rf"{name} \((.*function body: )?not found\)"):
        compile_again(compiled_dit, exported_dit, tmp_path, target, tensors=tampered)
    assert files_below(tmp_path) == before
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == [target]


def test_leftover_metadata_stops_before_anything_is_written(
    compiled_dit: Any, exported_dit: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lower_cleanly = Target.lower

    def lower_and_litter(target: Target, model: ir.Model) -> ir.Model:
        lower_cleanly(target, model).graph[0].metadata_props["stack_trace"] = "/home/somebody/x.py"
        return model

    monkeypatch.setattr(Target, "lower", lower_and_litter)
    with pytest.raises(CompileError, match="local paths"):
        compile_again(compiled_dit, exported_dit, tmp_path, "portable")
    assert not list(tmp_path.iterdir())


def make_large(num_floats: int) -> ir.Model:
    """A model that claims a weight of that size without having it."""
    x = ir.val("x", ir.DataType.FLOAT, [2])
    relu = ir.node("Relu", [x])

    def make() -> ir.TensorProtocol:
        raise AssertionError("the weight was read")

    tensor = ir.LazyTensor(make, dtype=ir.DataType.FLOAT, shape=ir.Shape([num_floats]), name="w")
    weight = ir.val("w", const_value=tensor)
    graph = ir.Graph(
        [x],
        relu.outputs,
        nodes=[relu],
        initializers=[weight],
        opset_imports={"": 21},
        name="g",
    )
    return ir.Model(graph, ir_version=10)


def test_never_refuses_what_one_file_cannot_hold(tmp_path: Path):
    model = make_large(600_000_000)
    assert initializer_bytes(model) == 2_400_000_000
    path = tmp_path / "model.onnx"
    with pytest.raises(CompileError, match=r"2\.4 GB.*compile\.external_data to auto or always"):
        save_model(model, path, "never")
    assert not path.exists()


@pytest.mark.parametrize(
    ("external_data", "limit", "external"),
    [("auto", 10_000, True), ("auto", 10_000_000, False), ("never", 10_000, False)],
)
def test_auto_depends_on_the_size(
    external_data: str,
    limit: int,
    external: bool,
    tmp_path: Path,
    make_layer: Make,
    make_model: Make,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("treeq_export.compile.stage.EXTERNAL_ABOVE_BYTES", limit)
    layer = make_layer(k=512, n=64)
    model = lower(make_model(layer), "portable")
    assert 10_000 < initializer_bytes(model) < 10_000_000
    save_model(model, tmp_path / "model.onnx", external_data)
    assert (tmp_path / "model.onnx.data").exists() == external
    with OrtRunner(tmp_path / "model.onnx", threads=1) as runner:
        np.testing.assert_allclose(runner.run({"x": layer.x}), layer.expected, rtol=1e-4, atol=1e-4)


def test_steps_rise_to_one(make_tiny_run: Make, monkeypatch: pytest.MonkeyPatch):
    """With one target only; the exports are replaced by a hand-made graph's clone."""
    tiny = make_tiny_run("dit")
    recipe = tiny.recipe.compile.model_copy(update={"targets": ["ort"]})
    empty = make_large(1)
    empty.graph.initializers.clear()
    monkeypatch.setattr("treeq_export.compile.stage.export_graph", lambda *_: empty.clone())
    steps: list[float] = []
    run_compile(tiny.run, tiny.denoiser, tiny.plan, tiny.tensors, recipe, steps.append)
    assert steps == sorted(steps)
    assert len(set(steps)) == 4
    assert steps[-1] == 1.0
    written = json.loads((tiny.run / "compile.json").read_text())["targets"]
    assert [entry["target"] for entry in written] == ["ort", "fp32"]
