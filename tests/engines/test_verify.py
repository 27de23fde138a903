"""The verifier against engines of TensorRT-RTX, some of them wrong on purpose."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from treeq_export.engines.layer_list import EngineLayer, parse_layers
from treeq_export.engines.verify import check, verify
from treeq_export.errors import CompileError

LAYER, OTHER = "blocks.0.fc", "blocks.0.head"


def test_an_int8_gemm_and_a_plugin_obey_the_plan(make_graph: Any, build_graph: Any):
    graph = make_graph(LAYER, OTHER)
    graph.int8_layer(LAYER)
    graph.plugin_layer(OTHER)
    table = verify(*build_graph(graph), {LAYER: (8, 8), OTHER: (3, 3)})
    assert [(layer.name, layer.became, layer.passed) for layer in table.layers] == [
        (LAYER, "int8 gemm", True),
        (OTHER, "plugin", True),
    ]
    assert (table.summary.num_quantized, table.summary.passed_fraction) == (2, 1.0)
    check("engine", table)


def test_a_run_time_scale_per_token_becomes_no_int8_gemm(make_graph: Any, build_graph: Any):
    graph = make_graph(LAYER)
    graph.token_scale_layer(LAYER)
    table = verify(*build_graph(graph), {LAYER: (8, 8)})
    assert not table.layers[0].passed
    assert table.summary.passed_fraction == 0
    with pytest.raises(CompileError, match=rf"{LAYER} \(quantized\) became .*Compile again"):
        check("engine", table)


def test_a_weight_only_product_is_no_quantized_layer(make_graph: Any, build_graph: Any):
    graph = make_graph(LAYER)
    graph.half_layer(LAYER)
    facts, engine = build_graph(graph)
    wrong = verify(facts, engine, {LAYER: (8, 8)})
    with pytest.raises(CompileError, match=f"{LAYER}.*became"):
        check("engine", wrong)
    right = verify(facts, engine, {LAYER: (8, 0)})
    check("engine", right)
    assert (right.summary.num_quantized, right.summary.num_weight_only) == (0, 1)


@pytest.mark.parametrize("kind", ["int8_layer", "plugin_layer"])
def test_a_floating_point_layer_that_was_quantized_is_named(
    make_graph: Any, build_graph: Any, kind: str
):
    graph = make_graph(LAYER)
    graph.int8_layer(LAYER)
    getattr(graph, kind)(OTHER)
    table = verify(*build_graph(graph), {LAYER: (8, 8)})
    with pytest.raises(CompileError, match=rf"{OTHER}.* \(floating-point\) became"):
        check("engine", table)


def test_a_weight_only_layer_that_became_integer_fails(make_graph: Any, build_graph: Any):
    graph = make_graph(LAYER)
    graph.int8_layer(LAYER)
    table = verify(*build_graph(graph), {LAYER: (8, 0)})
    with pytest.raises(CompileError, match=rf"{LAYER} \(weight-only\) became int8 gemm"):
        check("engine", table)


def test_a_layer_that_is_not_in_the_graph_fails(make_graph: Any, build_graph: Any):
    graph = make_graph(LAYER)
    graph.int8_layer(LAYER)
    table = verify(*build_graph(graph), {LAYER: (8, 8), OTHER: (4, 4)})
    with pytest.raises(CompileError, match=rf"{OTHER} \(quantized\) became not found"):
        check("engine", table)


def line(
    kind: str = "gemm", inputs: str = "Int8", constants: str = "Int8", nodes: tuple[str, ...] = ()
) -> str:
    tensors = [f"{{ Name: t, Dimensions: [1,2], Datatype: {t} }}" for t in (inputs, constants)]
    metadata = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    return (
        f"Name: a+b, LayerType: {kind}, Inputs: [ {tensors[0]}], Constants: [ {tensors[1]}], "
        f"Outputs: [ {tensors[0]}], TacticName: , StreamId: 0, Metadata: {metadata}"
    )


def test_a_line_is_read():
    text = (
        f"Layers:\n{line(nodes=('fc/product', 'fc/dq'))}\n\nI/O Tensors:\n Name: x, IOMode: Input"
    )
    assert parse_layers(text) == [
        EngineLayer("a+b", "gemm", ("Int8",), ("Int8",), frozenset({"fc/product", "fc/dq"}))
    ]


@pytest.mark.parametrize(
    ("kind", "inputs", "constants", "plugin", "int8"),
    [
        ("gemm", "Int8", "Int8", False, True),
        ("gemm", "Int8", "Float", False, True),  # the weight is an input where it is unpacked first
        ("gemm", "Half", "Int8", False, False),
        ("gemm", "Int8", "Half", False, False),
        ("kgen", "Int8", "Int8", False, False),
        ("custom_layer", "Int8", "Int8", True, False),
        ("PluginV3", "Half", "Int32", True, False),
    ],
)
def test_what_counts_as_plugin_and_as_int8_gemm(
    kind: str, inputs: str, constants: str, plugin: bool, int8: bool
):
    (layer,) = parse_layers(line(kind, inputs, constants))
    assert (layer.is_plugin, layer.is_int8_product) == (plugin, int8)


def test_the_inspectors_json_is_read():
    entry = {
        "Name": "fc",
        "LayerType": "CaskGemmMatrixMultiply",
        "Inputs": [{"Name": "x", "Format/Datatype": "Row major Int8 format"}],
        "Constants": [{"Name": "w", "Datatype": "Int8"}],
        "Metadata": "[ONNX Layer: fc/product]\x1e[ONNX Layer: fc/dq]",
    }
    (layer,) = parse_layers(json.dumps({"Layers": [entry]}))
    assert layer.is_int8_product
    assert layer.nodes == {"fc/product", "fc/dq"}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "no layers"),
        ("Layers:\nName: a, something new", "unknown form"),
        (json.dumps({"Layers": ["fc"]}), "DETAILED"),
    ],
)
def test_a_list_of_another_form_is_refused(text: str, word: str):
    with pytest.raises(CompileError, match=word):
        parse_layers(text)


def test_an_integer_layer_without_origin_is_a_stranger(make_graph: Callable[..., Any]):
    from treeq_export.engines.graph_facts import read_facts

    graph = make_graph(LAYER)
    graph.int8_layer(LAYER)
    facts = read_facts(graph.save(), max_batch=8)
    table = verify(facts, parse_layers(line() + "\n" + line(nodes=(f"{LAYER}/product",))), {})
    assert [layer.became for layer in table.layers] == ["int8 gemm", "int8 gemm"]
    assert not any(layer.passed for layer in table.layers)
