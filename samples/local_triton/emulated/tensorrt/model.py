"""EMULATED: a stand-in for Triton's TensorRT backend, which the wheel's server lacks.

It takes an unmodified `tensorrt_plan` model, looks at nothing of the engine but that the file is
there, and runs the graph that TREEQ_EMULATED_GRAPH names (of the same target, with its function
bodies) in the Python package onnxruntime on the CPU. That tests schema, scheduling and wiring of a
repository. It says nothing about the engine.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the graph that stands for the engine."""
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        engine = folder / (config["default_model_filename"] or "model.plan")
        if not engine.is_file():
            raise pb_utils.TritonModelException(f"{engine}: missing.")
        self.session = onnxruntime.InferenceSession(
            os.environ["TREEQ_EMULATED_GRAPH"], providers=["CPUExecutionProvider"]
        )
        self.outputs = [output["name"] for output in config["output"]]
        pb_utils.Logger.log_warn(f"{args['model_name']}: the TensorRT backend is EMULATED.")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Run each request by itself."""
        responses = []
        for request in requests:
            feeds = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            results = self.session.run(self.outputs, feeds)
            tensors = [
                pb_utils.Tensor(name, np.ascontiguousarray(result))
                for name, result in zip(self.outputs, results, strict=True)
            ]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses
