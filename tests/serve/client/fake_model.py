"""A stand-in of the sampler and of the denoiser, run by the real server: noise instead of images.

Inputs, outputs, errors and streaming are those of the repository that `treeq-export serve` writes.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

FOLDER = Path(__file__).parent


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        if (FOLDER / "broken").is_file():
            raise pb_utils.TritonModelException("broken on purpose")
        self.config = json.loads(args["model_config"])
        self.decoupled = pb_utils.using_decoupled_model_transaction_policy(self.config)
        shapes = {output["name"]: output["dims"] for output in self.config["output"]}
        self.shape = shapes.get("latents") or shapes["prediction"]

    def execute(self, requests: Any) -> Any:
        if not self.decoupled:
            return [self._answer(request) for request in requests]
        for request in requests:
            sender = request.get_response_sender()
            steps, every = int(_row(request, "steps", 20)), int(_row(request, "preview_every", 0))
            for step in range(every, steps, every) if every else ():
                sender.send(self._answer(request, step))
            sender.send(self._answer(request), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return None

    def _answer(self, request: Any, step: int | None = None) -> Any:
        first = pb_utils.get_input_tensor_by_name(request, self.config["input"][0]["name"])
        num = len(first.as_numpy())
        if "treeq_mode" not in self.config["parameters"]:
            fill = np.nan if (FOLDER / "nan").is_file() else 0.5
            return _response(request, prediction=np.full((num, *self.shape), fill, np.float32))
        given = {key: value["string_value"] for key, value in self.config["parameters"].items()}
        seeds = _column(request, "seed", num, 0)
        labels = _column(request, "label", num, 0)
        classes = int(given.get("treeq_num_classes", "1"))
        if labels.min() < 0 or labels.max() >= classes:
            text = f"sampler: label: received {labels.max()}, expected 0..{classes - 1}."
            error = pb_utils.TritonError(text, pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=error)
        if int(given["slow_seed"]) in seeds:
            time.sleep(0.8)
        if int(given["raising_seed"]) in seeds:
            raise ValueError("raised on purpose")
        latents = np.stack(
            [
                np.random.default_rng((int(seed), int(label))).standard_normal(self.shape)
                for seed, label in zip(seeds, labels, strict=True)
            ]
        ).astype(np.float32)
        pixels = np.clip(np.rint(latents * 64 + 128), 0, 255).astype(np.uint8)
        done = _column(request, "steps", num, 20) if step is None else np.full(num, step)
        return _response(
            request,
            latents=latents,
            image=np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)),
            step=done.astype(np.int32)[:, None],
        )


def _column(request: Any, name: str, num: int, default: int) -> NDArray[Any]:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return np.full(num, default) if tensor is None else tensor.as_numpy()[:, 0]


def _row(request: Any, name: str, default: int) -> Any:
    return _column(request, name, 1, default)[0]


def _response(request: Any, **outputs: NDArray[Any]) -> Any:
    wanted = request.requested_output_names()
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor(name, array) for name, array in outputs.items() if name in wanted]
    )
