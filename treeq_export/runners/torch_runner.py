"""PyTorch on the CPU: the full-precision model, or the fake-quantized one."""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeq_export.model.zoo import Denoiser


class TorchRunner:
    """Runs a denoiser in PyTorch.

    Args:
        denoiser: Full precision, or with `QLinear` modules.
        threads: Threads of PyTorch while the runner is entered; None leaves them as they are.
    """

    def __init__(self, denoiser: Denoiser, *, threads: int | None = None) -> None:
        self.denoiser = denoiser
        self.threads = threads
        self._threads_before = 0

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return self.denoiser.input_names

    def __enter__(self) -> Self:
        self._threads_before = torch.get_num_threads()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        self.denoiser.eval()
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads_before)

    def run(self, inputs: Mapping[str, NDArray[Any] | Tensor]) -> NDArray[np.float32]:
        """Return the raw network output of named inputs, each with a leading batch axis."""
        tensors = [torch.as_tensor(inputs[name]) for name in self.input_names]
        with torch.no_grad():
            return self.denoiser(*tensors).numpy()
