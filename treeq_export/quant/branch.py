"""The General Monarch Branch: a structured sparse correction M beside a quantized weight.

M is a grid of b_out x b_in blocks, each of rank r, held as two stacks of dense factors:

    R: (b_in, K/b_in, b_out*r)        L: (b_out, b_in*r, N/b_out)
    z = x.reshape(b_in, K/b_in) @ R   -> (b_in, b_out, r) -> (b_out, b_in*r)
    M x = (z @ L).reshape(N)

(1, 1, r) is plain low rank, as in SVDQuant. TreeQ publishes the branch; this parametrisation and
its start from a truncated SVD of each block of W are ours.
"""

import numpy as np
from numpy.typing import NDArray

from treeq_export.quant.spec import BranchFormat

FloatArray = NDArray[np.floating]


def fit_branch(weight: FloatArray, branch: BranchFormat) -> tuple[FloatArray, FloatArray]:
    """Return the factors of the best rank-r approximation of each block of W.

    Args:
        weight: (N, K) floating point.
        branch: Block grid and rank.

    Returns:
        R (b_in, K/b_in, b_out*r) and L (b_out, b_in*r, N/b_out), float32. The singular values are
        shared evenly between both factors.
    """
    n, k = weight.shape
    b_in, b_out, rank = branch.b_in, branch.b_out, branch.rank
    blocks = weight.astype(np.float64).reshape(b_out, n // b_out, b_in, k // b_in)
    u, s, vt = np.linalg.svd(blocks.transpose(0, 2, 1, 3), full_matrices=False)
    root = np.sqrt(s[..., :rank])
    left = u[..., :rank] * root[..., None, :]  # (b_out, b_in, N/b_out, r)
    right = vt[..., :rank, :] * root[..., :, None]  # (b_out, b_in, r, K/b_in)
    r_factor = right.transpose(1, 3, 0, 2).reshape(b_in, k // b_in, b_out * rank)
    l_factor = left.transpose(0, 1, 3, 2).reshape(b_out, b_in * rank, n // b_out)
    return (
        np.ascontiguousarray(r_factor, dtype=np.float32),
        np.ascontiguousarray(l_factor, dtype=np.float32),
    )


def apply_branch(x: FloatArray, r_factor: FloatArray, l_factor: FloatArray) -> FloatArray:
    """Return M x for x (..., K), as (..., N)."""
    b_in, block_in, _ = r_factor.shape
    b_out, inner, block_out = l_factor.shape
    tokens = x.reshape(-1, b_in, 1, block_in)
    z = (tokens @ r_factor).reshape(-1, b_in, b_out, inner // b_in)
    z = z.transpose(0, 2, 1, 3).reshape(-1, b_out, 1, inner)
    return (z @ l_factor).reshape(*x.shape[:-1], b_out * block_out)


def dense_branch(r_factor: FloatArray, l_factor: FloatArray) -> FloatArray:
    """Return M as a dense (N, K) matrix."""
    k = r_factor.shape[0] * r_factor.shape[1]
    return np.ascontiguousarray(apply_branch(np.eye(k, dtype=r_factor.dtype), r_factor, l_factor).T)
