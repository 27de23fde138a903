"""Every quantizing kernel of the written list, in the interpreter, against quant/numerics."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from treeq_gpu.instantiations import INSTANTIATIONS, Instantiation

from tests.gpu_kernels.conftest import deinterleave, interleave
from tests.hand_layers import make_format
from treeq_export.ops import ActScale
from treeq_export.quant import numerics
from treeq_export.quant.grids import INTEGER
from treeq_export.quant.rotation import rotate

TORCH_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SCALES = {scale.number: scale for scale in ActScale}
QUANTIZERS = [i for i in INSTANTIATIONS.values() if i.kernel == "quantize_tokens_kernel"]


def assert_equal_to_reference(
    codes: torch.Tensor,
    scale: torch.Tensor,
    x: torch.Tensor,
    act_scale: Any,
    step: float,
    group: int,
    bits: int,
) -> None:
    """Compare with the reference in float64: codes may differ by 1, at rounding ties only."""
    k = x.shape[1]
    rotated = rotate(x.double().numpy(), group)
    expected_scale = numerics.activation_scale(rotated, act_scale, step)
    expected = numerics.quantize_activation(rotated, expected_scale, bits)
    natural = deinterleave(codes.numpy())
    assert not natural[:, k:].any()
    off = np.abs(natural[:, :k].astype(int) - expected)
    ties = np.abs(np.abs(rotated / expected_scale) % 1 - 0.5) < 1e-4
    assert not off[~ties].any()
    assert off.max() <= 1
    # bf16 has 8 bits, so some of its values are exactly at a tie of an 8-bit grid.
    assert (off == 0).mean() >= (0.998 if x.dtype == torch.bfloat16 else 0.999)
    assert np.allclose(scale.numpy(), expected_scale[:, 0], rtol=1e-6)


def in_features_of(group: int) -> int:
    """Return a K past one step that is not of 32 where `group` allows it."""
    return {1: 167, 2: 166, 4: 140, 8: 136, 16: 144}.get(group, 3 * group + 128)


@pytest.mark.parametrize("instantiation", QUANTIZERS, ids=lambda i: i.name)
def test_codes_and_scales_equal_reference(instantiation: Instantiation, gpu: ModuleType):
    kind, group = instantiation.constants["KIND"], instantiation.constants["GROUP"]
    act_scale, bits = SCALES[kind], 8 if kind == ActScale.TOKEN_ABSMAX.number else 3
    k = in_features_of(group)
    rng = np.random.default_rng(k + kind)
    x = torch.from_numpy(rng.standard_normal((21, k)).astype(np.float32))
    x[3], x[5, 7], x[20] = 0, 30, x[20] * 1e-4
    x = x.to(TORCH_TYPES[instantiation.dtype])
    step = {"static": 0.7, "rms": INTEGER.gaussian_step[3], "absmax": 1 / 127}[act_scale.statistic]

    layer = make_format(
        act_bits=bits, act_scale=act_scale, act_step=step, rotation_group=group, in_features=k
    )
    codes, scale = gpu.quantize_tokens(x, layer)

    assert_equal_to_reference(codes, scale, x, act_scale, step, group, bits)
    assert not codes[3].any()
    assert scale[3] == torch.tensor(step if act_scale.is_static else numerics.SCALE_FLOOR)


@pytest.mark.parametrize(
    ("m", "k", "group"), [(1, 1152, 128), (2, 4608, 32), (1, 40, 8), (17, 72, 1)]
)
def test_shapes_of_networks(m: int, k: int, group: int, gpu: ModuleType):
    x = torch.from_numpy(np.random.default_rng(k).standard_normal((m, k)).astype(np.float16))
    step = INTEGER.gaussian_step[4]

    layer = make_format(act_step=step, rotation_group=group, in_features=k)
    codes, scale = gpu.quantize_tokens(x, layer)

    assert codes.shape == (m, -(-k // 128) * 128)
    assert_equal_to_reference(codes, scale, x, "token_rms", step, group, 4)


def test_halves_round_to_even(gpu: ModuleType):
    x = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 9.0]])
    layer = make_format(act_scale="tensor_static", act_step=1.0, rotation_group=1, in_features=8)
    codes, _ = gpu.quantize_tokens(x, layer)
    assert deinterleave(codes.numpy())[0, :8].tolist() == [-2, -2, 0, 0, 2, 2, 4, 7]


def test_static_scale_keeps_inf_and_nan_in_their_group(gpu: ModuleType):
    x = torch.ones(3, 64)
    x[0, 5], x[1, 5], x[2, 4:6] = torch.inf, torch.nan, torch.tensor([torch.inf, -torch.inf])
    layer = make_format(act_scale="tensor_static", act_step=1.0, rotation_group=4)
    codes, scale = gpu.quantize_tokens(x, layer)
    natural = deinterleave(codes.numpy())[:, :64]
    assert natural[0, 4:8].tolist() == [7, -8, 7, -8]
    assert natural[1, 4:8].tolist() == [0, 0, 0, 0]
    assert natural[2, 4:8].tolist() == [0, 7, 0, 7]
    others = np.delete(natural, np.s_[4:8], axis=1)
    assert np.array_equal(others, np.tile([2, 0, 0, 0], (3, 15)))
    assert scale.tolist() == [1.0, 1.0, 1.0]


def test_order_of_columns_is_that_of_the_contract():
    codes = np.arange(64, dtype=np.int8)[None]
    stored = interleave(codes)[0, :64].reshape(2, 8, 4)
    for word in range(2):
        for i in range(8):
            for j in range(4):
                assert stored[word, i, j] == 32 * word + 8 * j + i
    assert np.array_equal(deinterleave(interleave(codes))[:, :64], codes)
