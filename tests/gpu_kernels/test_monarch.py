"""Both monarch kernels of every type and shape class, in the interpreter, against float64."""

from types import ModuleType

import pytest
import torch
from treeq_gpu.instantiations import INSTANTIATIONS

from tests.gpu_kernels.conftest import assert_as_exact_as_torch

TORCH_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def reference(x: torch.Tensor, r: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Return the branch as model/monarch.py has it, in the type of x."""
    b_in, block_in, width = r.shape
    b_out, inner, block_out = left.shape
    z = torch.einsum("mik,iko->mio", x.reshape(-1, b_in, block_in), r)
    z = z.reshape(-1, b_in, b_out, width // b_out).transpose(1, 2).reshape(-1, b_out, inner)
    return torch.einsum("moi,oic->moc", z, left).reshape(len(x), b_out * block_out)


@pytest.mark.parametrize("dtype", TORCH_TYPES)
@pytest.mark.parametrize(
    ("m", "b_in", "block_in", "b_out", "rank", "block_out"),
    [
        (67, 2, 48, 4, 16, 72),  # wide, every extent a multiple of 8
        (67, 3, 35, 2, 5, 37),  # wide, none
        (1, 1, 72, 1, 8, 40),  # plain low rank
        (13, 4, 18, 2, 3, 70),  # token
    ],
)
def test_branch_equals_reference(
    m: int,
    b_in: int,
    block_in: int,
    b_out: int,
    rank: int,
    block_out: int,
    dtype: str,
    gpu: ModuleType,
):
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, b_in * block_in, generator=generator).to(TORCH_TYPES[dtype])
    r = torch.randn(b_in, block_in, b_out * rank, generator=generator).to(x.dtype) / 8
    left = torch.randn(b_out, b_in * rank, block_out, generator=generator).to(x.dtype) / 8

    y = gpu.monarch(x, r, left)

    assert y.dtype == x.dtype
    expected = reference(x.double(), r.double(), left.double()).numpy()
    assert_as_exact_as_torch(y, expected, reference(x, r, left).double().numpy())


def test_axes_before_the_channels_are_kept(gpu: ModuleType):
    x, r, left = torch.randn(2, 3, 16), torch.randn(2, 8, 4), torch.randn(2, 4, 5)
    y = gpu.monarch(x, r, left)
    assert y.shape == (2, 3, 10)
    expected = reference(x.reshape(6, 16), r, left).reshape(2, 3, 10)
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert gpu.monarch(torch.empty(0, 16), r, left).shape == (0, 10)


def test_list_holds_both_halves():
    for half in ("in", "out"):
        for shape_class in ("token", "wide"):
            for dtype in TORCH_TYPES:
                assert f"monarch_{half}_{shape_class}_{dtype}" in INSTANTIATIONS
