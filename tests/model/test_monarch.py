"""The Monarch branch as a module against the numpy reference."""

import numpy as np
import pytest
import torch
from torch import Tensor

from treeq_export.model.monarch import Monarch
from treeq_export.quant.branch import apply_branch

K, N = 128, 24


def random_input(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 1, 3), (1, 3, 2), (4, 2, 3), (8, 6, 1)])
@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3)])
def test_monarch_equals_the_reference(shape: tuple[int, int, int], leading: tuple[int, ...]):
    b_in, b_out, rank = shape
    rng = np.random.default_rng(0)
    r_factor = rng.standard_normal((b_in, K // b_in, b_out * rank))
    l_factor = rng.standard_normal((b_out, b_in * rank, N // b_out))
    module = Monarch(torch.from_numpy(r_factor), torch.from_numpy(l_factor))
    x = random_input(*leading, K)
    y = module(x)
    assert y.shape == (*leading, N)
    expected = apply_branch(x.numpy(), r_factor, l_factor)
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-10, atol=1e-10)


def test_monarch_gradients():
    module = Monarch(random_input(2, K // 2, 6), random_input(3, 4, N // 3)).requires_grad_(True)
    x = random_input(3, K).requires_grad_()

    def forward(x: Tensor, r_factor: Tensor, l_factor: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"R": r_factor, "L": l_factor}, (x,))

    assert torch.autograd.gradcheck(forward, (x, module.R, module.L), fast_mode=True)
