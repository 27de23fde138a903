from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.hand_layers import lower
from treeq_export.compile.audits.tensorrt import (
    AUDIT_FILE,
    INT8_GEMM,
    PLUGIN,
    WEIGHT_ONLY,
    audit_tensorrt,
)
from treeq_export.errors import CompileError
from treeq_export.targets.names import ENGINES, TENSORRT, TENSORRT_NATIVE

Make = Callable[..., Any]


def save(model: ir.Model, folder: Path) -> Path:
    path = folder / "model.onnx"
    ir.save(model, path)
    return path


@pytest.mark.parametrize(("target", "kind"), [(TENSORRT, PLUGIN), (TENSORRT_NATIVE, INT8_GEMM)])
def test_kinds(
    target: str, kind: str, tmp_path: Path, make_layer: Make, make_model: Make, make_plan: Make
):
    layers = [
        make_layer(name="blocks.0.a", weight_bits=3),
        make_layer(name="blocks.0.b", weight_bits=6, seed=1),
        make_layer(name="blocks.0.c", act_bits=None, act_scale="none", seed=2),
    ]
    audit = audit_tensorrt(save(lower(make_model(*layers), target), tmp_path), *make_plan(*layers))
    assert [entry.name for entry in audit] == ["blocks.0.a", "blocks.0.b", "blocks.0.c"]
    assert [entry.op_type for entry in audit] == [kind, kind, WEIGHT_ONLY]
    assert [entry.integer for entry in audit] == [True, True, False]
    assert [entry.weight_only for entry in audit] == [False, False, True]
    AUDIT_FILE.check(target, audit)


@pytest.mark.parametrize("target", ENGINES)
def test_layer_of_other_codes_is_missing(
    target: str, tmp_path: Path, make_layer: Make, make_model: Make, make_plan: Make
):
    layer = make_layer()
    path = save(lower(make_model(layer), target), tmp_path)
    layer.codes[0, 0] ^= 1
    audit = audit_tensorrt(path, *make_plan(layer))
    assert [entry.op_type for entry in audit] == ["not found"]
    with pytest.raises(
        CompileError, match=r"1 of 1 .* in the compiled file: blocks\.0\.fc \(not found\)"
    ):
        AUDIT_FILE.check(target, audit)


def test_node_without_plugin_attributes_is_named(
    tmp_path: Path, make_layer: Make, make_model: Make, make_plan: Make
):
    """TensorRT would import the function body and say nothing."""
    layer = make_layer()
    model = lower(make_model(layer), TENSORRT)
    [node] = [node for node in model.graph if node.op_type == "QLinear"]
    del node.attributes["plugin_namespace"]
    audit = audit_tensorrt(save(model, tmp_path), *make_plan(layer))
    assert [entry.op_type for entry in audit] == ["QLinear without plugin attributes"]
    with pytest.raises(CompileError, match=r"blocks\.0\.fc \(QLinear without plugin attributes\)"):
        AUDIT_FILE.check(TENSORRT, audit)


@pytest.mark.parametrize("tamper", ["activation", "scale"])
def test_float_products_are_named(
    tamper: str, tmp_path: Path, make_layer: Make, make_model: Make, make_plan: Make
):
    layer = make_layer()
    model = lower(make_model(layer), TENSORRT_NATIVE)
    [product] = [node for node in model.graph if node.name == "blocks.0.fc/product"]
    if tamper == "activation":
        dequantize = product.inputs[0].producer()
        product.replace_input_with(0, dequantize.inputs[0].producer().inputs[0])
    else:
        scale = model.graph.initializers["blocks.0.fc.weight_quantized_scale"]
        array = scale.const_value.numpy().astype(np.float16)
        scale.const_value, scale.dtype = ir.tensor(array, name=scale.name), ir.DataType.FLOAT16
    [entry] = audit_tensorrt(save(model, tmp_path), *make_plan(layer))
    assert not entry.integer
    expected = WEIGHT_ONLY if tamper == "activation" else "float gemm"
    assert entry.op_type == expected
    with pytest.raises(CompileError, match=rf"blocks\.0\.fc \({expected}\)"):
        AUDIT_FILE.check(TENSORRT_NATIVE, [entry])
