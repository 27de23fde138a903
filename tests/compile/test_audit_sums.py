from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.hand_layers import lower
from treeq_export.compile.audits.sums import audit_sums, check_sums
from treeq_export.compile.bodies.storage import SIGNED
from treeq_export.errors import CompileError
from treeq_export.records import AuditLayer
from treeq_export.runners.cpu_kernels import CpuQLinear
from treeq_export.runners.layer_probe import LayerProbe
from treeq_export.targets.table import TARGETS as ALL_TARGETS
from treeq_export.targets.table import different_ways, way_named

Make = Callable[..., Any]
TARGETS = sorted(target.name for target in ALL_TARGETS if target.audit is not None)


def make_layers(make_layer: Make) -> list[Any]:
    return [
        make_layer(name="a", weight_bits=8, act_bits=8),
        make_layer(name="b", weight_bits=8, act_bits=8, seed=1),
        make_layer(name="c", weight_bits=4, act_bits=3, seed=2),
        make_layer(name="d", act_bits=None, act_scale="none", seed=3),
    ]


def lower_all(
    layers: list[Any], target: str, make_model: Make, make_plan: Make
) -> tuple[ir.Model, Any, dict[str, Any]]:
    return lower(make_model(*layers), target), *make_plan(*layers)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("target", TARGETS)
def test_every_target_is_exact(
    target: str, rank: int, make_layer: Make, make_model: Make, make_plan: Make
):
    layers = [
        make_layer(name="a", weight_bits=8, act_bits=8, rank=rank),
        make_layer(name="b", weight_bits=4, act_bits=3, rank=rank, seed=2),
        make_layer(name="c", act_bits=None, act_scale="none", rank=rank, seed=3),
    ]
    model, plan, tensors = lower_all(layers, target, make_model, make_plan)
    assert audit_sums(model, different_ways([target]), plan, tensors) == {
        "a": True,
        "b": True,
    }


def test_groups(make_layer: Make, make_model: Make, make_plan: Make):
    layers = [make_layer(name="a", weight_bits=8, act_bits=8, group_size=16)]
    for target in ("portable", "ort"):
        model, plan, tensors = lower_all(layers, target, make_model, make_plan)
        assert audit_sums(model, different_ways([target]), plan, tensors) == {"a": True}


def test_sums_beyond_float32_are_compared_as_rounded(
    make_layer: Make, make_model: Make, make_plan: Make
):
    layer = make_layer(name="a", weight_bits=8, act_bits=8, k=2048)
    layer.codes[:] = -127
    model, plan, tensors = lower_all([layer], "portable", make_model, make_plan)
    assert 127 * 128 * 2048 > 2**24
    assert audit_sums(model, different_ways(["portable"]), plan, tensors) == {"a": True}


@pytest.mark.parametrize("which", ["worst", "other"])
def test_the_worst_layer_of_a_kind_stands_for_it(
    which: str, make_layer: Make, make_model: Make, make_plan: Make
):
    """Its weights in the file are not the plan's, which only who runs it can see."""
    layers = make_layers(make_layer)
    layers[1].codes[0, :2] = -128
    layers[0].codes = np.clip(layers[0].codes, -100, 100)
    model, plan, tensors = lower_all(layers, "portable", make_model, make_plan)
    name = "b" if which == "worst" else "a"
    tensors[f"{name}.codes"] = tensors[f"{name}.codes"].copy()
    tensors[f"{name}.codes"][0, 0] ^= 1
    exact = audit_sums(model, different_ways(["portable"]), plan, tensors)
    wrong = which == "worst"
    assert exact == {"a": not wrong, "b": not wrong, "c": True}


def test_saturated_sums_are_found(
    monkeypatch: pytest.MonkeyPatch, make_layer: Make, make_model: Make, make_plan: Make
):
    """What a processor without VNNI gives for INT8 weights of 8 bits."""
    monkeypatch.setattr("treeq_export.compile.bodies.qlinear.zero_points", lambda _: SIGNED)
    model, plan, tensors = lower_all(make_layers(make_layer), "portable", make_model, make_plan)
    monkeypatch.setattr(LayerProbe, "run_products", saturated(LayerProbe.run_products))
    exact = audit_sums(model, different_ways(["portable"]), plan, tensors)
    assert exact == {"a": False, "b": False, "c": True}


def saturated(run: Any) -> Any:
    """Return run_products with sums of at most 16 bits, as a pair of products has them."""
    return lambda probe, codes: np.clip(run(probe, codes), -32768, 32767)


@pytest.mark.skipif(
    not way_named("ort").uses_kernels, reason="our custom-op library is not installed"
)
def test_kernels_are_checked_too(
    monkeypatch: pytest.MonkeyPatch, make_layer: Make, make_model: Make, make_plan: Make
):
    model, plan, tensors = lower_all(make_layers(make_layer), "ort", make_model, make_plan)
    inspect = CpuQLinear.inspect

    def off_by_one(*given: Any) -> Any:
        codes, scales, sums = inspect(*given)
        return codes, scales, sums + 1

    monkeypatch.setattr(CpuQLinear, "inspect", off_by_one)
    assert set(audit_sums(model, different_ways(["ort"]), plan, tensors).values()) == {False}


def test_error_names_the_processor(make_layer: Make, make_plan: Make):
    plan, _ = make_plan(*make_layers(make_layer))
    audit = [
        AuditLayer(name=name, op_type="MatMulIntegerToFloat", integer=True, exact_sums=exact)
        for name, exact in (("a", False), ("b", False), ("c", True), ("d", None))
    ]
    with pytest.raises(CompileError) as caught:
        check_sums("portable", audit, plan, "Some Processor", ["avx2", "fma"])
    assert str(caught.value) == (
        "target portable: int32 sums of 2 of 4 layers (W8A8; first a) are not exact on this "
        "processor, Some Processor (avx2 fma). Use the ONNX Runtime version of constraints.txt, "
        "or leave the target out of compile.targets."
    )
    check_sums("portable", audit[2:], plan, "Some Processor", [])
