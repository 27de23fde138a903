"""Every form of a layer in TensorRT's targets against quant.numerics, run by ONNX Runtime.

The input is rounded to float16 first, as the body holds it; codes and int32 sums then have to be
the reference's, and the output its rounding to float16.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from tests.hand_layers import lower
from treeq_export.quant.branch import apply_branch
from treeq_export.quant.metrics import sqnr_db
from treeq_export.runners.graph_meta import TARGET_KEY, read_layers
from treeq_export.targets.names import ENGINES, TENSORRT, TENSORRT_NATIVE
from treeq_export.targets.table import way_named

Make = Callable[..., Any]
RMS, ABSMAX, STATIC = "token_rms", "token_absmax", "tensor_static"
BOTH: dict[str, dict[str, Any]] = {
    "w2a2": {"weight_bits": 2, "act_bits": 2},
    "w3a3-rank2": {"weight_bits": 3, "act_bits": 3, "rank": 2, "n": 7},
    "w4a4-nobias": {"weight_bits": 4, "act_bits": 4, "bias": False},
    "w5a5": {"weight_bits": 5, "act_bits": 5, "rotation_group": 1},
    "w6a6": {"weight_bits": 6, "act_bits": 6, "rotation_group": 64, "n": 1},
    "w7a7-absmax": {"weight_bits": 7, "act_bits": 7, "act_scale": ABSMAX, "rank": 2},
    "w8a8-absmax": {"weight_bits": 8, "act_bits": 8, "act_scale": ABSMAX},
    "w8a8-static": {"weight_bits": 8, "act_bits": 8, "act_scale": STATIC, "rank": 2},
    "w4a3-static": {"act_bits": 3, "act_scale": STATIC, "bias": False},
    "w2a8": {"weight_bits": 2, "act_bits": 8, "act_scale": ABSMAX, "k": 40, "rotation_group": 8},
    "group-is-k": {"group_size": 64},
    "weight-only": {"act_bits": None, "act_scale": "none", "weight_bits": 3},
    "weight-only-8": {"act_bits": None, "act_scale": "none", "weight_bits": 8, "rank": 2},
    "weight-only-group16": {"act_bits": None, "act_scale": "none", "group_size": 16, "n": 16},
    "weight-only-group32-w6": {
        "act_bits": None,
        "act_scale": "none",
        "group_size": 32,
        "weight_bits": 6,
        "bias": False,
    },
}
PLUGIN_ONLY: dict[str, dict[str, Any]] = {
    "group32": {"group_size": 32, "n": 5},
    "group32-absmax-w8": {
        "k": 96,
        "group_size": 32,
        "act_scale": ABSMAX,
        "weight_bits": 8,
        "act_bits": 8,
    },
}
CASES = [(target, case) for target in ENGINES for case in BOTH]
CASES += [(TENSORRT, case) for case in PLUGIN_ONLY]
# The last rounding to float16, relative to the largest output.
ROUNDING = 2.0**-11
# A weight-only product, whose operands are rounded too: rotated activations and scaled weights.
LEAST_HALF_PRODUCT_DB = 65.0


def run_whole(model: ir.Model, x: NDArray[Any]) -> NDArray[Any]:
    """Run the checked model as validate does: weight-only products in full precision."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    with way_named(model.metadata_props[TARGET_KEY]).open(proto.SerializeToString()) as runner:
        return runner.run({"x": x})


@pytest.mark.parametrize(("target", "case"), CASES)
def test_equals_the_reference(target: str, case: str, make_layer: Make, make_model: Make):
    layer = make_layer(**(BOTH | PLUGIN_ONLY)[case])
    layer.x = layer.x.astype(np.float16).astype(np.float32)
    model = lower(make_model(layer), target)
    probe = way_named(target).probe(model, read_layers(model)[0])
    output, codes = probe.run_output(layer.x)
    sums = probe.run_accumulators(layer.x)
    weight_only = layer.activation.bits is None
    if weight_only:
        assert codes is None
        assert sums is None
    else:
        np.testing.assert_array_equal(codes, layer.expected_codes)
        np.testing.assert_array_equal(sums, layer.expected_sums)
    bound = ROUNDING * np.abs(layer.expected).max()
    received = run_whole(model, layer.x)
    for y in (output, received):
        assert y.dtype == np.float32
        if weight_only:
            assert sqnr_db(layer.expected, y) > LEAST_HALF_PRODUCT_DB
        else:
            np.testing.assert_array_equal(y, y.astype(np.float16).astype(np.float32))
            np.testing.assert_allclose(y, layer.expected, rtol=0, atol=bound)


@pytest.mark.parametrize("target", ENGINES)
def test_a_branch_is_added(target: str, make_layer: Make, make_branch: Make, make_sum_model: Make):
    """Also for weight-only layers, whose sum stays an Add, and for a grid of blocks."""
    for options in ({}, {"act_bits": None, "act_scale": "none"}):
        layer, branch = make_layer(n=12, **options), make_branch(2, 2, 2)
        layer.x = layer.x.astype(np.float16).astype(np.float32)
        model = lower(make_sum_model(layer, branch), target)
        expected = layer.expected + apply_branch(layer.x, branch.R, branch.L)
        output, _ = way_named(target).probe(model, read_layers(model)[0]).run_output(layer.x)
        for y in (output, run_whole(model, layer.x)):
            assert sqnr_db(expected, y) > LEAST_HALF_PRODUCT_DB


def test_sums_that_overflow_float16_are_kept(make_layer: Make, make_model: Make):
    """W8A8 with large codes: the int32 sums are far beyond 65504, the outputs are not."""
    layer = make_layer(weight_bits=8, act_bits=8, act_scale=ABSMAX, k=512, rotation_group=1)
    layer.codes[:] = 127
    layer.x = np.full_like(layer.x, 1.0)
    layer.weight_scale *= 1e-2
    assert np.abs(layer.expected_sums).max() > 100 * 65504
    for target in (TENSORRT, TENSORRT_NATIVE):
        received = run_whole(lower(make_model(layer), target), layer.x)
        bound = ROUNDING * np.abs(layer.expected).max()
        np.testing.assert_allclose(received, layer.expected, rtol=0, atol=bound)
