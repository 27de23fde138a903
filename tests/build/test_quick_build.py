"""`--plugins quick` without TensorRT: refusals, facts of the graph, keys, manifest."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from treeq_export.build import BuildOptions, run_build
from treeq_export.build.cache import CacheEntry, EngineInputs
from treeq_export.build.graph_facts import read_facts
from treeq_export.build.layer_list import EngineLayer
from treeq_export.build.verify import verify
from treeq_export.cli import main
from treeq_export.compile.split_quick_plugins import split_file
from treeq_export.errors import RecipeError, RunnerError
from treeq_export.recipe import CompileSection
from treeq_export.runners.tensorrt_library import Runtime
from treeq_export.runners.tensorrt_plugin import KERNELS_VARIABLE
from treeq_export.runners.tensorrt_quick_plugin import (
    hash_quick_kernels,
    register_quick_plugins,
    require_quick_plugins,
)

INPUTS: dict[str, Any] = {
    "graph_sha256": "g",
    "data_sha256": None,
    "runtime": "tensorrt",
    "runtime_version": "10.8.0",
    "gpu": "sm_80",
    "profile": {},
    "plugins": [],
}


def test_rtx_has_none_and_says_so_in_one_line(tmp_path: Path):
    words = "--runtime tensorrt-rtx --gpu sm_89 --plugins quick"
    result = CliRunner().invoke(main, ["build", "--run", str(tmp_path), *words.split()])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "--plugins quick: tensorrt-rtx has none; TensorRT >= 10.8 has." in line


def test_the_help_says_that_it_is_untested():
    text = " ".join(CliRunner().invoke(main, ["build", "--help"]).output.split())
    assert "[library|quick]" in text
    assert "untested: needs TensorRT and a GPU" in text


def test_a_target_without_plugins_is_refused():
    with pytest.raises(RecipeError, match="received --target tensorrt-native, expected tensorrt"):
        BuildOptions("tensorrt", ("sm_80",), ("tensorrt-native",), split=split_file).check()


@pytest.mark.parametrize("version", ["10.7.0.23", "9.3"])
def test_an_old_tensorrt_is_refused(version: str):
    with pytest.raises(RunnerError, match=rf"received tensorrt {version}, expected .* >= 10\.8"):
        require_quick_plugins(Runtime("tensorrt", None, version))
    require_quick_plugins(Runtime("tensorrt", None, "10.8.0.43"))
    require_quick_plugins(Runtime("tensorrt", None, "11.0.0"))


def test_kernels_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
    with pytest.raises(RunnerError, match=r"no GPU kernels.*treeq_gpu\.ahead"):
        hash_quick_kernels()
    monkeypatch.setenv(KERNELS_VARIABLE, str(tmp_path))
    with pytest.raises(RunnerError, match=r"kernels\.json: missing"):
        hash_quick_kernels()
    (tmp_path / "kernels.json").write_text('{"kernels": [{"arch": "sm_90"}]}')
    with pytest.raises(RunnerError, match="kernels for sm_90, but the GPU is sm_80"):
        register_quick_plugins(Runtime("tensorrt", None, "10.8.0"), "sm_80")


def test_keys_differ():
    made = [
        EngineInputs(**INPUTS),
        EngineInputs(**INPUTS, plugin_kind="quick", kernels_sha256="a"),
        EngineInputs(**INPUTS, plugin_kind="quick", kernels_sha256="b"),
    ]
    assert len({inputs.key for inputs in made}) == len(made)


def engine_layer(kind: str, *nodes: str) -> EngineLayer:
    return EngineLayer("+".join(nodes), kind, ("Half",), (), frozenset(nodes))


def test_the_verifier_maps_layers_of_a_split_graph(make_graph: Callable[..., Any]):
    graph = make_graph("blocks.0.fc", "blocks.1.fc")
    graph.plugin_layer("blocks.0.fc")
    graph.plugin_layer("blocks.1.fc")
    facts = read_facts(split_file(graph.save()), max_batch=8)
    assert facts.plugins == ()
    assert facts.products == {n: frozenset({n}) for n in ("blocks.0.fc", "blocks.1.fc")}
    assert facts.all_products == {"blocks.0.fc", "blocks.1.fc"}
    engine = [
        engine_layer("PluginV3", "blocks.0.fc/codes"),
        engine_layer("PluginV3", "blocks.0.fc"),
        engine_layer("PluginV3", "blocks.1.fc"),
    ]
    bits = {"blocks.0.fc": (3, 3), "blocks.1.fc": (3, 3)}
    table = verify(facts, engine, bits)
    assert [(row.name, row.became, row.passed) for row in table.layers] == [
        ("blocks.0.fc", "plugin", True),
        ("blocks.1.fc", "plugin", True),
    ]
    assert not verify(facts, engine[:2], bits).layers[1].passed


def test_a_build_orders_the_split_graph_and_its_manifest_says_what_it_is(
    copied_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The builder is a stand-in that makes a plugin of every layer."""
    (tmp_path / "kernels.json").write_text('{"kernels": []}')
    monkeypatch.setenv(KERNELS_VARIABLE, str(tmp_path))
    monkeypatch.setattr("treeq_export.build.options.own_gpu", lambda: "sm_80")
    runtime = Runtime("tensorrt", SimpleNamespace(), "10.8.0")
    monkeypatch.setattr("treeq_export.build.stage.load_runtime", lambda _: runtime)
    orders = []

    def build(cache: Path, inputs: EngineInputs, order: Any, _on_step: object) -> CacheEntry:
        orders.append(order)
        folder = cache / inputs.key
        folder.mkdir(parents=True)
        (folder / "model.engine").write_bytes(b"engine")
        names = sorted(
            n for nodes in read_facts(Path(order.graph), 8).products.values() for n in nodes
        )
        lines = [
            f"Name: l{i}, LayerType: PluginV3, Inputs: [], Outputs: [], Metadata: [ONNX Layer: {n}]"
            for i, n in enumerate(names)
        ]
        (folder / "layers.txt").write_text("\n".join(["Layers:", *lines]))
        return CacheEntry(
            inputs=inputs, engine_sha256="e", engine_bytes=6, build_s=1, peak_bytes=1, num_layers=1
        )

    monkeypatch.setattr("treeq_export.build.stage.build_into", build)
    manifests = []
    for split in (None, split_file):
        options = BuildOptions(
            "tensorrt", ("sm_80",), ("tensorrt",) if split is None else (), split=split
        )
        record = run_build(
            copied_run, options, CompileSection(max_batch=8), lambda *_: lambda _: None
        )
        manifests.append(record.engines[0].manifest)
    library, quick = manifests
    assert [(order.plugin_kind, Path(order.graph).name) for order in orders] == [
        ("library", "model.onnx"),
        ("quick", "model.quick.onnx"),
    ]
    assert library.key != quick.key
    assert library.graph_sha256 == quick.graph_sha256
    assert [plugin.name for plugin in library.plugins] == ["Monarch", "QLinear"]
    assert (quick.plugins, quick.plugin_kind) == ([], "quick")
    assert quick.note == "quick plugins: untested: needs TensorRT and a GPU"
    assert (library.plugin_kind, library.note) == ("library", None)
    assert quick.verifier.num_plugins == quick.verifier.num_quantized > 0
