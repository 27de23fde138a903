"""EMULATED: a stand-in for Triton's ONNX Runtime backend, which the wheel's server lacks.

It loads an unmodified `onnxruntime_onnx` model, with its custom-op library, and runs each batch in
the Python package onnxruntime on the CPU. Schema, scheduling and wiring are those of the real
server; speed and memory are not those of the real backend.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the session that the configuration describes."""
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        options = onnxruntime.SessionOptions()
        threads = config["parameters"].get("intra_op_thread_count")
        if threads is not None:
            options.intra_op_num_threads = int(threads["string_value"])
        for library in config.get("model_operations", {}).get("op_library_filename", []):
            options.register_custom_ops_library(library)
        self.session = onnxruntime.InferenceSession(
            folder / (config["default_model_filename"] or "model.onnx"),
            options,
            providers=["CPUExecutionProvider"],
        )
        self.outputs = [output["name"] for output in config["output"]]
        pb_utils.Logger.log_warn(f"{args['model_name']}: the ONNX Runtime backend is EMULATED.")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Run all requests as one batch, as the real backend does."""
        parts = [
            {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            for request in requests
        ]
        feeds = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        try:
            results = self.session.run(self.outputs, feeds)
        except Exception as error:
            failed = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
            return [failed for _ in requests]
        ends = np.cumsum([len(next(iter(part.values()))) for part in parts])[:-1]
        split = [np.split(np.asarray(result), ends) for result in results]
        return [
            pb_utils.InferenceResponse(
                [
                    pb_utils.Tensor(name, array)
                    for name, array in zip(self.outputs, arrays, strict=True)
                ]
            )
            for arrays in zip(*split, strict=True)
        ]
