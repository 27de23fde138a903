"""PyTorch on a CUDA GPU: quantized linears by our Triton kernels, the rest in fp16 or bf16.

Where TensorRT is missing, this is what shows the kernels' effect end to end. Each batch size is
captured once in a CUDA graph; later calls copy the inputs into its buffers and replay it.
"""

from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeq_export.errors import RunnerError
from treeq_export.model.quantized import quantized_layers
from treeq_export.model.zoo import Denoiser
from treeq_export.runners.gpu_layers import (
    GpuQLinear,
    channel_order,
    gpu_layers,
    make_gpu_model,
)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_FLOAT32_INPUTS = ("timestep",)  # the embedding of 0..1000 is computed in float32
_NOT_ENTERED = "CudaRunner: not entered. Use it in a with statement."
_WARM_RUNS = 2  # Triton compiles and the allocator settles outside the capture

Array = NDArray[Any]
Call = Callable[[], Tensor]


def capture_graph(call: Call) -> Call:
    """Capture a call that reads and writes fixed tensors; return what replays it.

    Args:
        call: Launches work on the current stream and returns its output.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_RUNS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


class GraphedModel:
    """A model that is captured once for every set of input shapes.

    Args:
        model: Takes and returns tensors.
        capture: Makes a replay of a call; None calls the model plainly.
    """

    def __init__(
        self, model: Callable[..., Tensor], capture: Callable[[Call], Call] | None
    ) -> None:
        self._model = model
        self._capture = capture
        self._replays: dict[tuple[torch.Size, ...], tuple[list[Tensor], Call]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the output; it is overwritten by the next call of the same shapes."""
        if self._capture is None:
            return self._model(*inputs)
        key = tuple(tensor.shape for tensor in inputs)
        if key not in self._replays:
            buffers = [tensor.clone() for tensor in inputs]
            self._replays[key] = buffers, self._capture(lambda: self._model(*buffers))
        buffers, replay = self._replays[key]
        for buffer, tensor in zip(buffers, inputs, strict=True):
            buffer.copy_(tensor)
        return replay()


class CudaRunner:
    """Runs a fake-quantized denoiser's plan in the Triton kernels.

    Args:
        quantized: With `QLinear` modules, on the CPU; it is left as it is.
        dtype: "float16" or "bfloat16" (or "float32", for comparisons).
        device: A CUDA device; "cpu" works in Triton's interpreter only.
        use_graphs: Whether batch sizes are captured in CUDA graphs.
        capture: See `GraphedModel`.
    """

    def __init__(
        self,
        quantized: Denoiser,
        *,
        dtype: str = "float16",
        device: str = "cuda",
        use_graphs: bool = True,
        capture: Callable[[Call], Call] = capture_graph,
    ) -> None:
        if dtype not in DTYPES:
            raise RunnerError(f"dtype {dtype}: expected one of {', '.join(DTYPES)}.")
        self.quantized = quantized
        self.dtype = DTYPES[dtype]
        self.device = torch.device(device)
        self._capture = capture if use_graphs else None
        self._model: Denoiser | None = None
        self._run: GraphedModel | None = None

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return self.quantized.input_names

    def __enter__(self) -> Self:
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise RunnerError(
                "CudaRunner: PyTorch sees no CUDA GPU. Run it on a machine with one, with a CUDA "
                "build of PyTorch."
            )
        self._model = make_gpu_model(self.quantized, self.device, self.dtype)
        self._run = GraphedModel(self._forward, self._capture)
        return self

    def __exit__(self, *_: object) -> None:
        self._model, self._run = None, None

    @property
    def model(self) -> Denoiser:
        """The model on the device; the runner has to be entered."""
        if self._model is None:
            raise RunnerError(_NOT_ENTERED)
        return self._model

    def prepare(self, inputs: Mapping[str, Array | Tensor]) -> list[Tensor]:
        """Return named inputs as tensors on the device, floating point in the runner's type.

        Raises:
            RunnerError: One is missing.
        """
        missing = [name for name in self.input_names if name not in inputs]
        if missing:
            raise RunnerError(
                f"CudaRunner: input {missing[0]} is missing. "
                f"Give all of {', '.join(self.input_names)}."
            )
        tensors = []
        for name in self.input_names:
            tensor = torch.as_tensor(inputs[name])
            cast = tensor.is_floating_point() and name not in _FLOAT32_INPUTS
            tensors.append(tensor.to(self.device, self.dtype if cast else tensor.dtype))
        return tensors

    def run_tensors(self, tensors: list[Tensor]) -> Tensor:
        """Return the output on the device of what `prepare` returned, without waiting."""
        if self._run is None:
            raise RunnerError(_NOT_ENTERED)
        with torch.no_grad():
            return self._run(*tensors)

    def run(self, inputs: Mapping[str, Array | Tensor]) -> NDArray[np.float32]:
        """Return the raw network output of named inputs, each with a leading batch axis."""
        return self.run_tensors(self.prepare(inputs)).float().cpu().numpy()

    def run_with_layers(
        self, inputs: Mapping[str, Array | Tensor]
    ) -> tuple[NDArray[np.float32], dict[str, Array]]:
        """Return the output, and every quantized layer's output by name, float32."""
        outputs: dict[str, Array] = {}

        def observe(name: str) -> Callable[..., None]:
            def hook(_module: object, _inputs: object, output: Tensor) -> None:
                outputs[name] = output.float().cpu().numpy()

            return hook

        handles = [
            self.model.model.get_submodule(name).register_forward_hook(observe(name))
            for name in quantized_layers(self.quantized)
        ]
        try:
            with torch.no_grad():
                output = self._forward(*self.prepare(inputs))
        finally:
            for handle in handles:
                handle.remove()
        return output.float().cpu().numpy(), outputs

    def _forward(self, *tensors: Tensor) -> Tensor:
        output = self.model(*tensors)
        first = next(gpu_layers(self.model), None)
        if first is not None:
            first[1].shared.clear()  # all layers share it
        return output


class GpuProbe:
    """Runs one layer alone in the Triton kernels, as `compare_layer` wants it.

    Args:
        layer: The layer on its device.
        dtype: Type of the input that it is given; float32 leaves only the kernels' own error.
    """

    def __init__(self, layer: GpuQLinear, dtype: torch.dtype = torch.float32) -> None:
        self.name = layer.plan.name
        self._layer = layer
        self._dtype = dtype

    def run_output(self, x: NDArray[np.float32]) -> tuple[Array, Array | None]:
        """Return y (..., N) float32 and the codes (..., K) int8."""
        given = self._input(x)
        with torch.no_grad():
            y = self._layer(given)
            codes = channel_order(self._layer.quantize(given)[0], x.shape[-1])
        return y.float().cpu().numpy(), codes.cpu().numpy().reshape(x.shape)

    def run_accumulators(self, x: NDArray[np.float32]) -> Array | None:
        """Return q_x q_w^T as (..., G, N) int32."""
        with torch.no_grad():
            sums = self._layer.sums(self._layer.quantize(self._input(x))[0]).cpu().numpy()
        return sums.reshape(*x.shape[:-1], *sums.shape[1:])

    def _input(self, x: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(x).to(self._layer.planes.device, self._dtype)
