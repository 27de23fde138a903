from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from treeq_export.errors import PlanError
from treeq_export.run_folder import RunFolder
from treeq_export.runners.graph_meta import (
    LAYERS_KEY,
    LayerSite,
    load_compiled,
    read_layers,
    write_layers,
)
from treeq_export.targets.names import ENGINES, TENSORRT_NATIVE
from treeq_export.targets.table import different_ways, way_named


def test_graphs_lie_in_a_folder_per_target(tmp_path: Path):
    for target in ("ort", "tensorrt", "tensorrt-native"):
        assert tmp_path / RunFolder.graph(target) == tmp_path / "onnx" / target / "model.onnx"


@pytest.mark.parametrize("target", ENGINES)
@pytest.mark.parametrize("saturates", [False, True])
def test_our_cpu_kernels_do_not_run_tensorrt_s_nodes(
    target: str, saturates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Their types are others. INT8 by INT8 stays only where ONNX Runtime would saturate it."""
    monkeypatch.setattr("treeq_export.runners.ways.products_saturate", lambda: saturates)
    (tmp_path / RunFolder.graph(target)).parent.mkdir(parents=True)
    way = way_named(target)
    assert not way.uses_kernels
    assert different_ways([target]) == [way]
    assert way.options(tmp_path / RunFolder.graph(target)) == {
        "use_kernels": False,
        "fold_constants": True,
        "keep_int8": saturates and target == TENSORRT_NATIVE,
    }


def test_missing_target_names_the_command(tmp_path: Path):
    with pytest.raises(PlanError, match=f"Run `treeq-export compile --run {tmp_path}` first"):
        load_compiled(tmp_path, "portable")


def test_layers_are_read_as_written():
    model = ir.Model(ir.Graph([], [], nodes=[], name="g"), ir_version=10)
    assert read_layers(model) == []
    sites = [LayerSite("b.1", "x", "y"), LayerSite("a.0", "y", 'odd "name"')]
    write_layers(model, sites)
    assert read_layers(model) == sites


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not JSON"),
        ("{}", "the whole: Input should be a valid array"),
        ("[1]", "0: "),
        ('[{"name": "x", "y": 1}]', "0.input: Field required"),
        (
            '[{"name": "x", "input": "a", "output": "b", "size": []}]',
            "0.size: Input should be a valid integer",
        ),
        ("[" * 100_000, "more than 64 levels deep"),
    ],
)
def test_malformed_metadata_are_one_line(text: str, problem: str):
    model = ir.Model(ir.Graph([], [], nodes=[], name="g"), ir_version=10)
    model.metadata_props[LAYERS_KEY] = text
    with pytest.raises(PlanError) as caught:
        read_layers(model)
    assert str(caught.value).startswith(f"the graph: treeq.layers: {problem}")
    assert str(caught.value).endswith("Run `treeq-export compile` again.")


@pytest.mark.parametrize("target", ["portable", "ort"])
def test_compiled_graph_lists_every_layer_of_the_plan(target: str, compiled_dit: Any):
    model = load_compiled(compiled_dit.run, target)
    sites = read_layers(model)
    assert [site.name for site in sites] == [layer.name for layer in compiled_dit.plan.layers]
    values = ir.convenience.create_value_mapping(model.graph)
    # What became part of a fused node has no value in the graph any more.
    fused = {""} if target == "ort" else set()
    for site in sites:
        assert {site.input, site.output} <= set(values) | fused
    nodes = {node.name for node in model.graph}
    if target == "ort":
        assert {site.node for site in sites} <= nodes
        merged = [site for site in sites if "+" in site.node]
        assert [(site.offset, site.size) for site in merged[:3]] == [
            (index * merged[0].size, merged[0].size) for index in range(3)
        ]
    else:
        # q, k and v read one value.
        assert len({site.input for site in sites if ".attn1.to_" in site.name}) == 4
