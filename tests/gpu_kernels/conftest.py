"""Fixtures of the GPU kernels: the interpreted ones, their operands, and the compiled ones."""

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from filelock import FileLock
from numpy.typing import NDArray

from treeq_export.quant import numerics
from treeq_export.quant.grids import INTEGER
from treeq_export.quant.packing import pack

triton = pytest.importorskip("triton")

KERNEL_MODULES = ("decode", "qlinear", "quantize_tokens", "monarch", "launch")
BUILD = Path(__file__).parents[2] / "build" / "gpu_kernels"


def interleave(codes: NDArray[np.int8]) -> NDArray[np.int8]:
    """Return codes (M, K) as the kernels read them, (M, KP): column 4i + j is channel 8j + i."""
    m, k = codes.shape
    padded = np.zeros((m, -(-k // 128) * 128), dtype=np.int8)
    padded[:, :k] = codes
    return padded.reshape(m, -1, 4, 8).transpose(0, 1, 3, 2).reshape(m, -1)


def deinterleave(codes: NDArray[np.int8]) -> NDArray[np.int8]:
    """Return the inverse of `interleave`, padding included."""
    m = len(codes)
    return codes.reshape(m, -1, 8, 4).transpose(0, 1, 3, 2).reshape(m, -1)


@pytest.fixture(scope="session")
def gpu() -> Iterator[ModuleType]:
    """`treeq_gpu.launch` with kernels of Triton's interpreter; the process's own stay compiled.

    A decorator decides when it runs whether a kernel is interpreted, so the modules are imported
    anew. Triton's own `tl.sum` and `tl.max` are decorated too, and replaced while a kernel runs.
    """
    import treeq_gpu
    from triton.runtime.interpreter import ReduceOps

    own = {name: sys.modules.pop(f"treeq_gpu.{name}", None) for name in KERNEL_MODULES}
    for name in KERNEL_MODULES:  # `from treeq_gpu import qlinear` looks here first
        if hasattr(treeq_gpu, name):
            delattr(treeq_gpu, name)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        launch: Any = importlib.import_module("treeq_gpu.launch")
    for name, module in own.items():
        del sys.modules[f"treeq_gpu.{name}"]
        delattr(treeq_gpu, name)
        if module is not None:
            sys.modules[f"treeq_gpu.{name}"] = module
            setattr(treeq_gpu, name, module)
    plain_launch = launch.launch

    def interpreted_launch(*args: Any) -> None:
        reductions = mock.patch.multiple(
            "triton.language",
            sum=lambda x, axis: ReduceOps(axis, None, False).sum(x),
            max=lambda x, axis: ReduceOps(axis, None, False).min_max(x, np.max),
        )
        with reductions, np.errstate(all="ignore"):
            plain_launch(*args)

    with mock.patch.object(launch, "launch", interpreted_launch):
        yield launch


@dataclass(frozen=True)
class Product:
    """Operands of a product, made by hand, and what it has to give."""

    codes: torch.Tensor
    planes: torch.Tensor
    act_scale: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor
    addend: torch.Tensor
    sums: NDArray[np.int32]  # (M, G, N)
    expected: NDArray[np.float64]  # (M, N)
    in_plain_torch: NDArray[np.float64]


def make_product(
    weight_bits: int, m: int, n: int, k: int, group_size: int, dtype: torch.dtype
) -> Product:
    """Return operands with codes over the whole range of 8 and `weight_bits` bits."""
    rng = np.random.default_rng(m * n + k + weight_bits)
    qmin, qmax = INTEGER.ends(weight_bits)
    q_x = rng.integers(-128, 128, (m, k)).astype(np.int8)
    q_w = rng.integers(qmin, qmax + 1, (n, k)).astype(np.int8)
    num_groups = k // group_size if group_size else 1
    s_x = rng.uniform(0.001, 0.003, m).astype(np.float32)
    s_w = rng.uniform(0.01, 0.03, (n, num_groups)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    addend = torch.from_numpy(rng.standard_normal((m, n)).astype(np.float32)).to(dtype)
    sums = numerics.accumulate(q_x, q_w, num_groups)
    expected = (sums * s_w.T.astype(np.float64)).sum(axis=1) * s_x[:, None]
    expected += bias + addend.double().numpy()
    x_hat = torch.from_numpy(q_x * s_x[:, None]).to(dtype)
    w_hat = torch.from_numpy(numerics.dequantize_weight(q_w, s_w)).to(dtype)
    plain = x_hat @ w_hat.T + torch.from_numpy(bias).to(dtype) + addend
    return Product(
        torch.from_numpy(interleave(q_x)),
        torch.from_numpy(pack(q_w, weight_bits)),
        torch.from_numpy(s_x),
        torch.from_numpy(s_w),
        torch.from_numpy(bias),
        addend,
        sums,
        expected,
        plain.double().numpy(),
    )


def assert_as_exact_as_torch(
    y: torch.Tensor, expected: NDArray[np.float64], plain: NDArray[np.float64]
) -> None:
    """Check that y's largest error is at most twice that of plain PyTorch, both against float64."""
    ours, theirs = (np.abs(v - expected).max() for v in (y.double().numpy(), plain))
    floor = np.abs(expected).max() * torch.finfo(y.dtype).eps / 2  # one rounding
    assert ours <= 2 * max(theirs, floor)


@pytest.fixture(scope="session")
def compiled() -> Callable[[], dict[str, Any]]:
    """A function: () -> kernels.json of all kernels, compiled once per content of the sources."""
    from treeq_gpu import ahead
    from treeq_gpu.instantiations import ARCHITECTURES, INSTANTIATIONS

    def get() -> dict[str, Any]:
        folder = BUILD / ahead.source_digest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            return ahead.compile_all(folder, list(ARCHITECTURES), list(INSTANTIATIONS))

    return get
