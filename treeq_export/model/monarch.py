"""The Monarch branch as a module; `treeq::Monarch` when exported (formula: quant/branch.py)."""

import torch
from torch import Tensor, nn


class Monarch(nn.Module):
    """A b_out x b_in grid of rank-r blocks beside a quantized linear.

    Args:
        r_factor: R, (b_in, K/b_in, b_out*r), float32.
        l_factor: L, (b_out, b_in*r, N/b_out), float32.
    """

    def __init__(self, r_factor: Tensor, l_factor: Tensor) -> None:
        super().__init__()
        self.R = nn.Parameter(r_factor, requires_grad=False)
        self.L = nn.Parameter(l_factor, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return M x, (..., N), of x (..., K)."""
        if torch.compiler.is_exporting():
            b_out, _, block_out = self.L.shape
            return torch.onnx.ops.symbolic(
                "treeq::Monarch",
                (x, self.R, self.L),
                dtype=x.dtype,
                shape=(*x.shape[:-1], b_out * block_out),
                version=1,
            )
        return apply_factors(x, self.R, self.L)


def apply_factors(x: Tensor, r_factor: Tensor, l_factor: Tensor) -> Tensor:
    """Return M x, (..., N), of x (..., K) and both factors (shapes: `Monarch`)."""
    b_in, block_in, _ = r_factor.shape
    b_out, inner, block_out = l_factor.shape
    tokens = x.reshape(-1, b_in, block_in).transpose(0, 1)
    z = torch.bmm(tokens, r_factor).reshape(b_in, -1, b_out, inner // b_in)
    z = z.permute(2, 1, 0, 3).reshape(b_out, -1, inner)
    return torch.bmm(z, l_factor).transpose(0, 1).reshape(*x.shape[:-1], b_out * block_out)
