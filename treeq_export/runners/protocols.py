"""What a stage may ask of whoever runs a network or a layer."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Runner(Protocol):
    """Runs a whole network; a runner of a device has to be entered before."""

    def run(self, inputs: Mapping[str, Any]) -> NDArray[np.float32]:
        """Return the raw network output of inputs by name, each with a leading batch axis."""
        ...


class Probe(Protocol):
    """Runs one quantized layer alone."""

    @property
    def name(self) -> str:
        """The layer's name."""
        ...

    def run_output(self, x: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Return y (..., N) and the activation codes (..., K) int8, None for weight-only layers.

        Args:
            x: The layer's input, (..., K).
        """
        ...

    def run_accumulators(self, x: NDArray[np.float32]) -> NDArray[Any] | None:
        """Return q_x q_w^T as (..., G, N), int32 or its float32; None for weight-only layers.

        Args:
            x: The layer's input, (..., K).
        """
        ...
