from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.hand_layers import lower
from treeq_export.compile.audits.onnx_runtime import (
    AUDIT_RUNTIME,
    audit_graph,
    optimized_graph,
)
from treeq_export.errors import CompileError

Make = Callable[..., Any]
NAMES = ["blocks.0.a", "blocks.0.b", "blocks.0.c"]


def save(model: ir.Model, folder: Path) -> Path:
    path = folder / "model.onnx"
    ir.save(model, path)
    return path


def remove_quantization(model: ir.Model, name: str) -> None:
    """Let the layer's MatMul read its activation without QuantizeLinear and DequantizeLinear."""
    [product] = [node for node in model.graph if node.name == f"{name}/product"]
    dequantize = product.inputs[0].producer()
    quantize = dequantize.inputs[0].producer()
    assert (quantize.op_type, dequantize.op_type) == ("QuantizeLinear", "DequantizeLinear")
    product.replace_input_with(0, quantize.inputs[0])
    model.graph.remove([dequantize, quantize], safe=True)


@pytest.mark.parametrize("target", ["portable", "ort"])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize(
    ("act_scale", "act_bits"), [("token_rms", 4), ("token_absmax", 8), ("tensor_static", 3)]
)
def test_siblings_of_one_input_all_become_integer(
    act_scale: str,
    act_bits: int,
    weight_bits: int,
    rank: int,
    target: str,
    tmp_path: Path,
    make_layer: Make,
    make_model: Make,
    make_plan: Make,
):
    """ONNX Runtime merges equal Q/DQ pairs of one tensor; then their MatMuls may fall back."""
    layers = [
        make_layer(
            name=name,
            act_scale=act_scale,
            weight_bits=weight_bits,
            act_bits=act_bits,
            rank=rank,
            seed=seed,
        )
        for seed, name in enumerate([*NAMES, "blocks.0.d"])
    ]
    path = save(lower(make_model(*layers), target), tmp_path)
    audit = audit_graph(path, *make_plan(*layers))
    assert [entry.name for entry in audit] == [*NAMES, "blocks.0.d"]
    assert {entry.op_type for entry in audit} == {"MatMulIntegerToFloat"}
    assert all(entry.integer for entry in audit)
    AUDIT_RUNTIME.check(target, audit)
    ops = Counter(node.op_type for node in optimized_graph(path, tmp_path).graph)
    assert ops["MatMulIntegerToFloat"] == 4
    assert ops["DequantizeLinear"] == ops["Gemm"] == 0


@pytest.mark.parametrize("target", ["portable", "ort"])
def test_groups_and_equal_weights_are_found(
    target: str, tmp_path: Path, make_layer: Make, make_model: Make, make_plan: Make
):
    layers = [
        make_layer(name="blocks.0.a", group_size=16),
        make_layer(name="blocks.0.b"),
        make_layer(name="blocks.0.c", bias=False),
    ]
    assert np.array_equal(layers[1].codes, layers[2].codes)
    audit = audit_graph(save(lower(make_model(*layers), target), tmp_path), *make_plan(*layers))
    # Equal codes cannot be told apart, so each entry holds what all layers with them became.
    both = "MatMulInteger + MatMulIntegerToFloat"
    assert [entry.op_type for entry in audit] in (
        [both] * 3,
        ["MatMulInteger", "MatMulIntegerToFloat", "MatMulIntegerToFloat"],
    )
    AUDIT_RUNTIME.check(target, audit)


def test_float_layer_is_named(tmp_path: Path, make_layer: Make, make_model: Make, make_plan: Make):
    layers = [make_layer(name=name, seed=seed) for seed, name in enumerate(NAMES)]
    model = lower(make_model(*layers), "portable")
    remove_quantization(model, "blocks.0.b")
    audit = audit_graph(save(model, tmp_path), *make_plan(*layers))
    assert [entry.integer for entry in audit] == [True, False, True]
    with pytest.raises(CompileError, match="target portable: 1 of 3") as caught:
        AUDIT_RUNTIME.check("portable", audit)
    message = str(caught.value)
    assert f"blocks.0.b ({audit[1].op_type})" in message
    assert "blocks.0.a" not in message
    assert "blocks.0.c" not in message
    assert "search.exclude" in message


def test_every_reader_of_the_weight_counts(
    tmp_path: Path, make_layer: Make, make_model: Make, make_plan: Make
):
    """One integer product beside another operator on the same codes is no integer layer."""
    layer = make_layer(name="blocks.0.a", weight_bits=8)
    model = lower(make_model(layer), "portable")
    row = ir.val("row", ir.DataType.INT64, [1])
    gather = ir.node("Gather", [model.graph.initializers["blocks.0.a.weight_quantized"], row])
    gather.outputs[0].type, gather.outputs[0].shape = (
        ir.TensorType(ir.DataType.INT8),
        ir.Shape([1, 13]),
    )
    model.graph.inputs.append(row)
    model.graph.append(gather)
    model.graph.outputs.append(gather.outputs[0])
    audit = audit_graph(save(model, tmp_path), *make_plan(layer))
    assert [entry.op_type for entry in audit] == ["Gather + MatMulIntegerToFloat"]
    with pytest.raises(CompileError, match=r"blocks\.0\.a \(Gather \+ MatMulIntegerToFloat\)"):
        AUDIT_RUNTIME.check("portable", audit)


def test_missing_layer_is_named(
    tmp_path: Path, make_layer: Make, make_model: Make, make_plan: Make
):
    layers = [make_layer(name=name, seed=seed) for seed, name in enumerate(NAMES)]
    path = save(lower(make_model(*layers[:2]), "ort"), tmp_path)
    audit = audit_graph(path, *make_plan(*layers))
    assert [entry.op_type for entry in audit][2] == "not found"
    with pytest.raises(CompileError, match=r"blocks\.0\.c \(not found\)\."):
        AUDIT_RUNTIME.check("ort", audit)


def test_weight_that_nothing_multiplies_is_missing(
    tmp_path: Path, make_layer: Make, make_plan: Make
):
    layer = make_layer(name="blocks.0.a")
    x = ir.val("x", ir.DataType.FLOAT, [2])
    relu = ir.node("Relu", [x])
    weight = ir.val("w", const_value=ir.tensor(np.ascontiguousarray(layer.codes.T)))
    graph = ir.Graph(
        [x],
        [relu.outputs[0], weight],
        nodes=[relu],
        initializers=[weight],
        opset_imports={"": 21},
        name="g",
    )
    relu.outputs[0].type, relu.outputs[0].shape = x.type, x.shape
    path = save(ir.Model(graph, ir_version=10), tmp_path)
    [entry] = audit_graph(path, *make_plan(layer))
    assert (entry.op_type, entry.integer) == ("not found", False)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize(
    ("target", "options", "op_type"),
    [
        ("portable", {}, "MatMulNBits"),
        ("portable", {"weight_bits": 2, "bias": False}, "MatMulNBits"),
        ("portable", {"group_size": 16}, "MatMulNBits"),
        ("portable", {"k": 40, "rotation_group": 8}, "MatMulNBits"),
        ("portable", {"k": 96, "rotation_group": 8, "group_size": 24}, "float"),
        ("portable", {"weight_bits": 5}, "float"),
        ("portable", {"weight_bits": 8, "group_size": 32}, "float"),
        ("ort", {}, "float"),
        ("ort", {"weight_bits": 8, "group_size": 16}, "float"),
    ],
)
def test_weight_only_layers_may_be_float(
    target: str,
    options: dict[str, Any],
    op_type: str,
    rank: int,
    tmp_path: Path,
    make_layer: Make,
    make_model: Make,
    make_plan: Make,
):
    given = {"rank": rank, "k": options.get("k", 64)}
    layers = [
        make_layer(name="a", act_bits=None, act_scale="none", **given | options),
        make_layer(name="b", seed=1, rotation_group=8, **given),
    ]
    audit = audit_graph(save(lower(make_model(*layers), target), tmp_path), *make_plan(*layers))
    assert [entry.weight_only for entry in audit] == [True, False]
    assert [entry.integer for entry in audit] == [False, True]
    expected = {"MatMul", "Gemm", "FusedMatMul"} if op_type == "float" else {op_type}
    assert audit[0].op_type in expected
    AUDIT_RUNTIME.check(target, audit)


def test_many_failures_are_counted(
    tmp_path: Path, make_layer: Make, make_model: Make, make_plan: Make
):
    layers = [make_layer(name=f"blocks.{seed}.a", seed=seed) for seed in range(11)]
    path = save(lower(make_model(layers[0]), "portable"), tmp_path)
    audit = audit_graph(path, *make_plan(*layers))
    with pytest.raises(CompileError) as caught:
        AUDIT_RUNTIME.check("portable", audit)
    message = str(caught.value)
    assert "10 of 11 quantized layers" in message
    assert "blocks.8.a (not found) and 2 more." in message
    assert "blocks.9.a" not in message


def test_refused_model_is_an_error(tmp_path: Path, make_plan: Make, make_layer: Make):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no protobuf at all")
    with pytest.raises(CompileError, match=r"model\.onnx: ONNX Runtime refuses it: ") as caught:
        audit_graph(path, *make_plan(make_layer()))
    assert "\n" not in str(caught.value)
