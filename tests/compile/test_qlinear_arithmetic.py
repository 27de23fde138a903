"""Every form of `treeq::QLinear` in ONNX Runtime against quant.numerics.qlinear.

One hand-made layer a case, lowered for each target; `ort` in our kernels and in its function body.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hand_layers import lower
from treeq_export.runners.graph_meta import read_layers
from treeq_export.runners.kernel_probe import KernelProbe
from treeq_export.runners.layer_probe import LayerProbe

Make = Callable[..., Any]
TARGETS = ["portable", "ort", "ort_body"]

# Each weight width, activation width, scale, rotation, group form, rank and bias occurs at least
# once; K that is no multiple of 32 and odd N as well.
RMS, ABSMAX, STATIC = "token_rms", "token_absmax", "tensor_static"
CASES: dict[str, dict[str, Any]] = {
    "w2a2": {"weight_bits": 2, "act_bits": 2},
    "w3a3": {"weight_bits": 3, "act_bits": 3, "rank": 2, "n": 7},
    "w4a4": {"weight_bits": 4, "act_bits": 4, "bias": False},
    "w5a5": {"weight_bits": 5, "act_bits": 5, "rotation_group": 1},
    "w6a6": {"weight_bits": 6, "act_bits": 6, "rotation_group": 64, "n": 1},
    "w7a7": {"weight_bits": 7, "act_bits": 7, "act_scale": ABSMAX, "rank": 2},
    "w8a8": {"weight_bits": 8, "act_bits": 8, "act_scale": ABSMAX},
    "w8a8-static": {"weight_bits": 8, "act_bits": 8, "act_scale": STATIC, "rank": 2},
    "w2a8": {"weight_bits": 2, "act_bits": 8, "act_scale": ABSMAX, "bias": False, "rank": 2},
    "w8a2": {"weight_bits": 8, "act_bits": 2, "act_scale": STATIC, "rotation_group": 1},
    "w3a8-rms": {"weight_bits": 3, "act_bits": 8, "rotation_group": 64, "k": 128},
    "w4a4-static": {"act_scale": STATIC, "bias": False},
    "w4a4-absmax": {"act_scale": ABSMAX, "rank": 2, "rotation_group": 1},
    "k40": {"k": 40, "rotation_group": 8, "n": 9},
    "k40-rank2": {"k": 40, "rotation_group": 8, "rank": 2, "weight_bits": 7, "bias": False},
    "k24-no-rotation": {"k": 24, "rotation_group": 1, "weight_bits": 3, "act_bits": 6},
    "group32": {"group_size": 32, "n": 5},
    "group16-rank2": {"group_size": 16, "rank": 2, "weight_bits": 5, "act_bits": 6},
    "group8-k40": {"k": 40, "rotation_group": 8, "group_size": 8, "weight_bits": 8, "act_bits": 8},
    "group32-static": {"group_size": 32, "act_scale": STATIC, "bias": False, "act_bits": 3},
    "group32-absmax": {"k": 96, "group_size": 32, "act_scale": ABSMAX, "act_bits": 7},
    "group-is-k": {"group_size": 64},
    "weight-only": {"act_bits": None, "act_scale": "none", "weight_bits": 3},
    "weight-only-rank2": {"act_bits": None, "act_scale": "none", "weight_bits": 8, "rank": 2},
    "weight-only-k40": {
        "act_bits": None,
        "act_scale": "none",
        "k": 40,
        "rotation_group": 8,
        "bias": False,
    },
    "weight-only-group16": {"act_bits": None, "act_scale": "none", "group_size": 16, "n": 5},
}


def check_layer(layer: Any, target: str, make_model: Make, run_onnx: Make) -> None:
    """Check codes, sums and output of one layer on one target."""
    model = lower(make_model(layer), target.removesuffix("_body"))
    make_probe = KernelProbe if target == "ort" else LayerProbe
    probe = make_probe(model, read_layers(model)[0])
    output, codes = probe.run_output(layer.x)
    sums = probe.run_accumulators(layer.x)
    if layer.activation.bits is None:
        assert codes is None
        assert sums is None
    else:
        assert codes.dtype == np.int8
        np.testing.assert_array_equal(codes, layer.expected_codes)
        np.testing.assert_array_equal(sums, layer.expected_sums)
    largest = np.abs(layer.expected).max()
    np.testing.assert_allclose(output, layer.expected, rtol=0, atol=1e-5 * largest)
    if target == "ort":
        return  # the whole graph is this one layer
    received = run_onnx(model, layer.x)
    assert received.dtype == np.float32
    np.testing.assert_allclose(received, layer.expected, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(
    case: str, target: str, make_layer: Make, make_model: Make, run_onnx: Make
):
    layer = make_layer(**CASES[case])
    assert not layer.x[(0,) * (layer.rank - 1)].any()
    check_layer(layer, target, make_model, run_onnx)


def test_cases_cover_every_width_and_form():
    default = {"weight_bits": 4, "act_bits": 4, "act_scale": RMS, "rank": 3}
    seen = [default | case for case in CASES.values()]
    assert {case["weight_bits"] for case in seen} == set(range(2, 9))
    assert {case["act_bits"] for case in seen} == {None, *range(2, 9)}
    pairs = {(case["act_scale"], case["rank"]) for case in seen}
    assert pairs == {(scale, rank) for scale in (RMS, ABSMAX, STATIC, "none") for rank in (2, 3)}


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    weight_bits=st.integers(2, 8),
    act_bits=st.integers(2, 8),
    act_scale=st.sampled_from([RMS, ABSMAX, STATIC]),
    k=st.sampled_from([8, 32, 40, 72, 96]),
    n=st.integers(1, 17),
    rotation_group=st.sampled_from([1, 4, 8]),
    group_size=st.sampled_from([None, 4, 8]),
    bias=st.booleans(),
    rank=st.sampled_from([2, 3]),
    seed=st.integers(0, 1000),
)
def test_any_combination_equals_the_reference(
    make_layer: Make, make_model: Make, run_onnx: Make, **options: Any
):
    for target in TARGETS:
        check_layer(make_layer(**options), target, make_model, run_onnx)
