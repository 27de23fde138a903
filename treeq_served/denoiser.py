"""The denoiser as a Python model: where the server has no backend for its runtime."""

from __future__ import annotations  # of classes that only the server has

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from treeq_served.check_manifest import check_model
from treeq_served.network import open_network
from treeq_served.settings import read_network


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Check the manifest and open the denoiser.

        Args:
            args: model_repository, model_version and more, by Triton.

        Raises:
            ValueError: The repository is not what its manifest says.
        """
        folder = Path(args["model_repository"])
        check_model(folder, args["model_version"])
        self.name: str = args["model_name"]
        self.settings = read_network(folder / args["model_version"])
        self._run = open_network(folder.parent, self.settings)

    def execute(
        self, requests: Sequence[pb_utils.InferenceRequest]
    ) -> list[pb_utils.InferenceResponse]:
        """Run all requests as one batch.

        Args:
            requests: InferenceRequest objects.

        Returns:
            One response for each request.
        """
        responses: list[Any] = [None] * len(requests)
        good: list[tuple[int, dict[str, NDArray[Any]]]] = []
        for index, request in enumerate(requests):
            inputs = self._read(request)
            bad = [name for name, array in inputs.items() if not np.isfinite(array).all()]
            if bad:
                text = f"{self.name}: {bad[0]}: holds NaN or infinity, expected finite numbers."
                responses[index] = _error(text, pb_utils.TritonError.INVALID_ARG)
            else:
                good.append((index, inputs))
        if good:
            for (index, _), response in zip(good, self._answer(good), strict=True):
                responses[index] = response
        return responses

    def _read(self, request: Any) -> dict[str, NDArray[Any]]:
        """Return the inputs by name; the server has applied their reshape."""
        return {
            name: pb_utils.get_input_tensor_by_name(request, name).as_numpy()
            for name in self.settings.inputs
        }

    def _answer(self, good: Sequence[tuple[int, dict[str, NDArray[Any]]]]) -> list[Any]:
        """Run good requests together; if that fails, each gets the error."""
        merged = {
            name: np.concatenate([inputs[name] for _, inputs in good])
            for name in self.settings.inputs
        }
        ends = np.cumsum([len(inputs[next(iter(inputs))]) for _, inputs in good])
        try:
            output = self._run(merged)
        except Exception as error:
            return [_error(f"{self.name}: {error}") for _ in good]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(self.settings.output, part)])
            for part in np.split(output, ends[:-1])
        ]


def _error(text: str, *code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, *code))
