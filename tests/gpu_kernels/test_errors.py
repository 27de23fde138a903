"""What the functions of treeq_gpu.launch refuse, in one line that names the argument."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.hand_layers import SMALL, make_format


@pytest.fixture
def call(gpu: ModuleType) -> Callable[..., torch.Tensor]:
    """A function: changed arguments -> qlinear of a small layer."""

    def qlinear(**changes: Any) -> torch.Tensor:
        tensors = {
            "x": torch.randn(2, 64),
            "planes": torch.zeros(3, 5, 2, dtype=torch.int32),
            "weight_scale": torch.ones(5, 1),
            "bias": torch.zeros(5),
            "addend": torch.zeros(2, 5),
        }
        fields = {name: value for name, value in changes.items() if name in SMALL}
        layer = replace(make_format(), **fields)
        positional = [changes.get(name, tensor) for name, tensor in tensors.items()]
        return gpu.qlinear(*positional, layer, out_dtype=changes.get("out_dtype"))

    return qlinear


def test_layer_as_it_is_works(call: Callable[..., torch.Tensor]):
    assert call().shape == (2, 5)
    assert call(out_dtype=torch.float16, addend=None).dtype == torch.float16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(2, 65)}, r"x: received float32 \(2, 65\), expected .* \(2, 64\)"),
        ({"x": torch.randn(64, 2).T}, r"x: received float32 \(2, 64\) \(strided\)"),
        ({"x": torch.randn(2, 64).double()}, "x: received float64"),
        ({"planes": torch.zeros(4, 5, 2, dtype=torch.int32)}, r"planes: .* \(3, 5, 2\)"),
        ({"planes": torch.zeros(3, 5, 2)}, "planes: received float32"),
        ({"weight_scale": torch.ones(5)}, r"weight_scale: .* \(5, 1\)"),
        ({"bias": torch.zeros(6)}, r"bias: .* \(5,\)"),
        ({"addend": torch.zeros(2, 5).half()}, "addend: received float16"),
        ({"weight_bits": 9}, r"weight_bits: received 9, expected 2\.\.8"),
        ({"act_bits": 1}, "act_bits: received 1"),
        ({"act_scale": "per_row"}, "act_scale: received per_row, expected one of"),
        ({"rotation_group": 24}, "rotation_group: received 24"),
        ({"rotation_group": 128}, "rotation_group: received 128"),
        ({"group_size": 48}, "group_size: received 48"),
    ],
)
def test_wrong_argument_is_named(
    changes: dict[str, object], message: str, call: Callable[..., torch.Tensor]
):
    with pytest.raises(ValueError, match=message) as error:
        call(**changes)
    assert "\n" not in str(error.value)


def test_factors_of_two_plans_are_refused(gpu: ModuleType):
    with pytest.raises(ValueError, match="R, L: received"):
        gpu.monarch(torch.randn(2, 16), torch.randn(2, 8, 4), torch.randn(2, 6, 5))
    with pytest.raises(ValueError, match="x: received"):
        gpu.monarch(torch.randn(2, 15), torch.randn(2, 8, 4), torch.randn(2, 4, 5))
