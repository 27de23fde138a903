"""A Monarch branch of its own through the C ABI, which only hosts in C use."""

import ctypes
from typing import Self

import numpy as np
from numpy.typing import NDArray

from treeq_export.runners.cpu_kernels import check_status, load_kernels


class CpuMonarch:
    """A Monarch branch of its own in the CPU kernels.

    Args:
        r: (b_in, K/b_in, b_out r) float32.
        l_factor: (b_out, b_in r, N/b_out) float32.
        name: Name in messages.
    """

    def __init__(
        self,
        r: NDArray[np.float32],
        l_factor: NDArray[np.float32],
        name: str = "treeq_monarch",
    ) -> None:
        self.name = name
        self._factors = np.ascontiguousarray(r), np.ascontiguousarray(l_factor)
        self.in_features = r.shape[0] * r.shape[1]
        self.out_features = l_factor.shape[0] * l_factor.shape[2]
        self._grid = (len(r), len(l_factor), r.shape[2] // len(l_factor))
        self._branch = ctypes.c_void_p()

    def __enter__(self) -> Self:
        pointers = [factor.ctypes.data for factor in self._factors]
        sizes = (self.in_features, self.out_features, *self._grid)
        check_status(
            load_kernels().treeq_monarch_create(*sizes, *pointers, self._branch), self.name
        )
        return self

    def __exit__(self, *_: object) -> None:
        load_kernels().treeq_monarch_destroy(self._branch)
        self._branch = ctypes.c_void_p()

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return M x (M, N) of x (M, K)."""
        x = np.ascontiguousarray(x, np.float32)
        y = np.empty((len(x), self.out_features), np.float32)
        status = load_kernels().treeq_monarch_run(
            self._branch, x.ctypes.data, len(x), y.ctypes.data, None
        )
        check_status(status, self.name)
        return y
