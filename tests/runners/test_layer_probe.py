from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from tests.hand_layers import lower
from treeq_export.errors import RunnerError
from treeq_export.model.quantized import quantize_model, quantized_layers
from treeq_export.quant import numerics
from treeq_export.runners.graph_meta import LayerSite, load_compiled, read_layers
from treeq_export.runners.layer_probe import LayerProbe

Make = Callable[..., Any]
TARGETS = ["portable", "ort"]


@pytest.mark.parametrize("target", TARGETS)
def test_one_of_several_layers_is_cut_out(target: str, make_layer: Make, make_model: Make):
    layers = [
        make_layer(name="a", seed=1),
        make_layer(name="b", weight_bits=8, act_bits=8, seed=2),
        make_layer(name="c", group_size=16, seed=3),
    ]
    model = lower(make_model(*layers), target)
    before = ir.to_proto(model).SerializeToString()
    for layer, site in zip(layers, read_layers(model), strict=True):
        probe = LayerProbe(model, site)
        output, codes = probe.run_output(layer.x)
        np.testing.assert_allclose(output, layer.expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(codes, layer.expected_codes)
        sums = probe.run_accumulators(layer.x)
        assert sums is not None
        assert sums.shape == layer.expected_sums.shape
        np.testing.assert_array_equal(sums, layer.expected_sums)
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("target", TARGETS)
def test_other_batches_than_the_exported_one(target: str, make_layer: Make, make_model: Make):
    layer = make_layer()
    model = lower(make_model(layer), target)
    layer.x = np.concatenate([layer.x] * 3)
    output, _ = LayerProbe(model, read_layers(model)[0]).run_output(layer.x)
    np.testing.assert_allclose(output, layer.expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_weight_only_layers_have_no_codes(target: str, make_layer: Make, make_model: Make):
    layer = make_layer(act_bits=None, act_scale="none")
    model = lower(make_model(layer), target)
    probe = LayerProbe(model, read_layers(model)[0])
    output, codes = probe.run_output(layer.x)
    np.testing.assert_allclose(output, layer.expected, rtol=1e-5, atol=1e-5)
    assert codes is None
    assert probe.run_accumulators(layer.x) is None


@pytest.mark.parametrize("target", TARGETS)
def test_layers_of_a_compiled_model(target: str, compiled_dit: Any):
    """The branch is in the output, and the sums are those of the plan's codes."""
    quantized = quantize_model(compiled_dit.denoiser, compiled_dit.plan, compiled_dit.tensors)
    references = quantized_layers(quantized)
    model = load_compiled(compiled_dit.run, target)
    rng = np.random.default_rng(0)
    sites = {site.name: site for site in read_layers(model)}
    for name, shape in (
        ("transformer_blocks.0.norm1.linear", (2, 64)),
        ("transformer_blocks.1.ff.net.2", (2, 16, 256)),
    ):
        x = rng.standard_normal(shape).astype(np.float32)
        probe = LayerProbe(model, sites[name])
        output, codes = probe.run_output(x)
        sums = probe.run_accumulators(x)
        with torch.no_grad():
            expected = references[name](torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
        assert codes is not None
        weight = compiled_dit.tensors[f"{name}.codes"]
        np.testing.assert_array_equal(sums, numerics.accumulate(codes, weight))


def test_layer_without_integer_product_is_an_error():
    x = ir.val("x", ir.DataType.FLOAT, ["batch", 4])
    scale = ir.val("one", const_value=ir.tensor(np.float32(1)))
    zero = ir.val("zero", const_value=ir.tensor(np.int8(0)))
    weight = ir.val("w", const_value=ir.tensor(np.eye(4, dtype=np.float32)))
    quantize = ir.node("QuantizeLinear", [x, scale, zero])
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero])
    product = ir.node("MatMul", [dequantize.outputs[0], weight])
    y = product.outputs[0]
    y.name, y.type, y.shape = "y", x.type, x.shape
    graph = ir.Graph(
        [x],
        [y],
        nodes=[quantize, dequantize, product],
        initializers=[scale, zero, weight],
        opset_imports={"": 21},
        name="g",
    )
    probe = LayerProbe(ir.Model(graph, ir_version=10), LayerSite("blocks.0.fc", "x", "y"))
    with pytest.raises(RunnerError, match=r"^blocks\.0\.fc: no matrix product"):
        probe.run_accumulators(np.ones((1, 4), np.float32))
