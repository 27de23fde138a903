"""Every grid in fake quantization and target portable; and one that the product does not have.

The levels of the grid `toy` are -3 -1 1 3 at 2 bits and the odd numbers -7 .. 7 at 3 bits. A
fixture adds it to GRIDS. Weights, activations, modules and target `portable` ask the `Grid` alone.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from tests.compile.test_qlinear_arithmetic import check_layer
from tests.hand_layers import lower
from treeq_export.errors import CompileError, FormatError
from treeq_export.finetune.student import TrainableLinear
from treeq_export.model.fit import LayerTokens, fit_layer
from treeq_export.model.qlinear import QLinear
from treeq_export.model.reconstruct import SoftLinear
from treeq_export.plan import LayerPlan, TreePath
from treeq_export.quant import grids, numerics
from treeq_export.quant.grids import Cells, Grid
from treeq_export.quant.packing import pack, unpack
from treeq_export.quant.spec import ActivationFormat, WeightFormat
from treeq_export.recipe import CalibrateSection, SearchSection

Make = Callable[..., Any]


def odd_levels(bits: int) -> NDArray[np.int8]:
    half = 1 << (bits - 1)
    return (2 * np.arange(-half, half) + 1).astype(np.int8)


TOY = Grid(
    "toy",
    odd_levels,
    {2: 0.9957 / 2, 3: 0.5860 / 2},
    cells=lambda bits: Cells(0.5, -(1 << (bits - 1)), odd_levels(bits)),
)


@pytest.fixture(autouse=True)
def with_toy_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "GRIDS", (*grids.GRIDS, TOY))


def make_plan(bits: int = 2, group_size: int | None = None) -> LayerPlan:
    return LayerPlan(
        name="layer",
        in_features=64,
        out_features=24,
        tree=TreePath(block=0, position="layer", leaf=0),
        weight=WeightFormat(bits=bits, group_size=group_size, grid="toy"),
        activation=ActivationFormat.model_validate(
            {"bits": bits, "scale": "token_rms", "grid": "toy"}
        ),
        rotation_group=32,
    )


def fit(plan: LayerPlan, rounding: str = "gptq") -> tuple[Any, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((plan.out_features, plan.in_features)).astype(np.float32)
    x = rng.standard_normal((200, plan.in_features)).astype(np.float32)
    section = CalibrateSection.model_validate({"rounding": rounding})
    return fit_layer(plan, weight, None, LayerTokens(x, x), section), x


# Numbers ----------------------------------------------------------------------------------------


def test_levels_are_the_nearest_and_have_no_zero():
    x = np.array([[-9.0, -2.1, -1.9, -0.1, 0.0, 1.9, 2.0, 9.0, np.nan]], dtype=np.float32)
    one = np.ones((1, 1), dtype=np.float32)
    expected = [[-3, -3, -1, -1, 1, 1, 3, 3, 1]]
    assert numerics.quantize_activation(x, one, 2, TOY).tolist() == expected
    assert numerics.quantize_weight(x[:, :8], one, 2, TOY).tolist() == [expected[0][:8]]


def test_gaussian_step_reaches_9_25_db_at_2_bits():
    x = np.random.default_rng(0).standard_normal(400_000)
    x_hat = TOY.round(x / TOY.gaussian_step[2], 2) * TOY.gaussian_step[2]
    error_db = -10 * np.log10(np.mean(np.square(x - x_hat)) / np.mean(np.square(x)))
    assert error_db == pytest.approx(9.25, abs=0.03)


def test_planes_hold_the_place_among_the_levels():
    levels = np.array([[-3, -1, 1, 3]], dtype=np.int8)
    assert pack(levels, 2, TOY)[:, 0, 0].tolist() == [10, 12]
    assert np.array_equal(unpack(pack(levels, 2, TOY), 4, TOY), levels)
    with pytest.raises(FormatError) as error:
        pack(np.array([[0]], dtype=np.int8), 2, TOY)
    assert str(error.value) == (
        "codes in [0, 0] do not fit 2 bits of grid toy ([-3, 3]). Quantize to 2 bits first."
    )


def test_plans_name_every_grid_but_integer():
    assert WeightFormat(bits=2, grid="toy").model_dump() == {
        "bits": 2,
        "group_size": None,
        "grid": "toy",
    }
    assert WeightFormat(bits=2).model_dump() == {"bits": 2, "group_size": None}
    assert make_plan().model_dump(mode="json")["activation"]["grid"] == "toy"


def test_unknown_grids_and_widths_are_refused():
    with pytest.raises(
        ValidationError, match=r"grid lut: unknown, expected one of integer,.* ?toy"
    ):
        WeightFormat(bits=2, grid="lut")
    with pytest.raises(ValidationError, match=r"grid toy has no 4 bits. Use one of \[2, 3\]"):
        SearchSection(strategy="tss", weight_grid="toy")
    section = SearchSection(weight_bits=2, weight_grid="toy")
    assert section.model_dump()["weight_grid"] == "toy"
    assert {"weight_grid", "activation_grid"}.isdisjoint(SearchSection().model_dump())


# Modules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("group_size", [None, 32])
def test_fitted_layers_have_the_grids_levels(rounding: str, group_size: int | None):
    plan = make_plan(group_size=group_size)
    fitted, _ = fit(plan, rounding)
    assert set(np.unique(fitted.tensors["codes"])) == {-3, -1, 1, 3}
    assert fitted.tensors["activation_step"] == np.float32(TOY.gaussian_step[2])


@pytest.mark.parametrize("bits", [2, 3])
def test_fake_quantization_is_the_reference(bits: int):
    plan = make_plan(bits)
    fitted, x = fit(plan)
    tensors = {k: v for k, v in fitted.tensors.items() if k != "bias"}
    expected = numerics.qlinear(
        x,
        tensors["codes"],
        tensors["weight_scale"],
        activation=plan.activation,
        step=float(tensors["activation_step"][0]),
        rotation_group=plan.rotation_group,
    )
    layer = QLinear(plan, tensors, None)
    assert np.array_equal(layer.codes, tensors["codes"])
    values = torch.from_numpy(x)
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(layer(values).numpy(), expected, rtol=0, atol=atol)
    rotated = layer.rotate(values)
    codes = layer.quantize(rotated, layer.activation_scale(rotated))
    assert set(np.unique(codes)) <= set(odd_levels(bits).tolist())
    sums = numerics.accumulate(codes.numpy().astype(np.int8), tensors["codes"])
    assert np.array_equal(layer.accumulate(codes).numpy(), sums)
    student = TrainableLinear(plan, tensors, np.ones((24, 64), np.float32), None, frozenset())
    np.testing.assert_allclose(student(values).detach().numpy(), expected, rtol=0, atol=atol)


def test_trained_codes_stay_levels():
    plan = make_plan()
    fitted, x = fit(plan)
    weight = np.ones((24, 64), np.float32)
    student = TrainableLinear(plan, fitted.tensors, weight, None, frozenset({"codes"}))
    with torch.no_grad():
        student.trained["codes"].add_(1.7 * torch.randn(24, 64))
    student(torch.from_numpy(x)).square().sum().backward()
    assert student.trained["codes"].grad is not None
    assert set(np.unique(student.export()["codes"])) == {-3, -1, 1, 3}


def test_learned_rounding_chooses_between_neighbouring_levels():
    plan = make_plan()
    fitted, _ = fit(plan)
    soft = SoftLinear(QLinear(plan, fitted.tensors, None), fitted.real_codes)
    between = soft.codes().detach().numpy()
    assert between.min() >= -3
    assert between.max() <= 3
    soft.harden()
    assert set(np.unique(soft.codes())) == {-3, -1, 1, 3}


# Graphs -----------------------------------------------------------------------------------------

# Places in the grid's widths stand for bits.
CASES: dict[str, dict[str, Any]] = {
    "least": {"weight_bits": 0, "act_bits": 0},
    "largest": {"weight_bits": -1, "act_bits": -1, "rank": 2, "k": 40, "rotation_group": 8},
    "static": {"weight_bits": -1, "act_bits": 0, "act_scale": "tensor_static"},
    "group": {"weight_bits": 0, "act_bits": -1, "act_scale": "token_absmax", "group_size": 16},
    "weight-only": {"weight_bits": -1, "act_bits": None, "act_scale": "none"},
}


def make_case(make_layer: Make, grid: Grid, case: str) -> Any:
    """Return the hand-made layer of a case."""
    bits = {
        name: grid.widths[place]
        for name, place in CASES[case].items()
        if name in ("weight_bits", "act_bits") and place is not None
    }
    return make_layer(grid=grid.name, **CASES[case] | bits)


@pytest.mark.parametrize("grid", [*grids.GRIDS, TOY], ids=lambda grid: grid.name)
@pytest.mark.parametrize("case", CASES)
def test_portable_graph_equals_the_reference(
    grid: Grid, case: str, make_layer: Make, make_model: Make, run_onnx: Make
):
    check_layer(make_case(make_layer, grid, case), "portable", make_model, run_onnx)


@pytest.mark.parametrize("target", ["ort", "tensorrt", "tensorrt-native"])
def test_targets_without_kernels_refuse_the_grid(target: str, make_layer: Make, make_model: Make):
    with pytest.raises(CompileError) as error:
        lower(make_model(make_case(make_layer, TOY, "least")), target)
    assert str(error.value).startswith("blocks.0.fc: grid toy, expected integer")
