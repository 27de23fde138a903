"""One CUDA stream, its device memory and its graphs, by `cuda.bindings.runtime`; no torch needed.

Every call's status is checked. What was allocated is freed when the device is left, whatever
happened in between.
"""

import logging
from collections.abc import Callable
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from treeq_export.errors import RunnerError
from treeq_export.runners.cuda_bindings import load_cudart

_log = logging.getLogger(__name__)


class CudaDevice:
    """A stream of the current GPU with the memory and graphs that belong to it.

    Args:
        cudart: The module `cuda.bindings.runtime`, or what has its functions; None imports it.
    """

    def __init__(self, cudart: Any = None) -> None:
        self._cudart = cudart
        self._pointers: list[int] = []
        self._graphs: list[Any] = []
        self._stream: Any = None

    def __enter__(self) -> Self:
        self._cudart = self._cudart or load_cudart()
        self._stream = self._call("cudaStreamCreate")
        return self

    def __exit__(self, *_: object) -> None:
        """Free everything; a failure here is logged, so that it hides no earlier error."""
        for graph in self._graphs:
            self._release("cudaGraphExecDestroy", graph)
        for pointer in self._pointers:
            self._release("cudaFree", pointer)
        self._release("cudaStreamDestroy", self._stream)
        self._graphs, self._pointers, self._stream = [], [], None

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        return int(self._stream)

    def allocate(self, num_bytes: int) -> int:
        """Return the address of new device memory of at least one byte."""
        pointer = int(self._call("cudaMalloc", max(num_bytes, 1)))
        self._pointers.append(pointer)
        return pointer

    def upload(self, pointer: int, array: NDArray[Any]) -> None:
        """Copy a contiguous host array to the device, in stream order."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", pointer, array.ctypes.data, array.nbytes, kind, self._stream)

    def download(self, array: NDArray[Any], pointer: int) -> None:
        """Copy device memory into a contiguous host array, in stream order."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, pointer, array.nbytes, kind, self._stream)

    def synchronize(self) -> None:
        """Wait for everything that was put into the stream."""
        self._call("cudaStreamSynchronize", self._stream)

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """Record what `enqueue` puts into the stream as a graph; nothing is executed.

        Args:
            enqueue: Puts work into this stream, and does not wait for it.

        Returns:
            The graph, for `launch`.

        Raises:
            RunnerError: The work cannot be captured; the stream is usable again.
        """
        mode = self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            enqueue()
        except BaseException:
            # Ends the capture; its own status only says that it was invalidated.
            self._release_capture()
            raise
        graph = self._call("cudaStreamEndCapture", self._stream)
        try:
            executable = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._release("cudaGraphDestroy", graph)
        self._graphs.append(executable)
        return executable

    def launch(self, graph: Any) -> None:
        """Put a captured graph into the stream."""
        self._call("cudaGraphLaunch", graph, self._stream)

    def _release_capture(self) -> None:
        status, graph = self._cudart.cudaStreamEndCapture(self._stream)
        if not int(status) and graph is not None:
            self._release("cudaGraphDestroy", graph)
        self._cudart.cudaGetLastError()

    def _release(self, function: str, handle: Any) -> None:
        try:
            self._call(function, handle)
        except RunnerError as error:
            _log.warning("%s", error)

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the runtime and return its result.

        Raises:
            RunnerError: The call's status is not success.
        """
        status, *results = getattr(self._cudart, function)(*arguments)
        if int(status):
            # The status stays behind in the runtime until it is read.
            self._cudart.cudaGetLastError()
            raise RunnerError(f"CUDA: {function} failed: {self._describe(status)}")
        return results[0] if results else None

    def _describe(self, status: Any) -> str:
        name = self._cudart.cudaGetErrorName(status)[1].decode()
        text = self._cudart.cudaGetErrorString(status)[1].decode()
        remedy = _REMEDIES.get(name, "`treeq-export doctor` shows GPU and driver.")
        return f"{name} ({text}). {remedy}"


_REMEDIES = {
    "cudaErrorMemoryAllocation": "Use a smaller batch, or free memory of the GPU.",
    "cudaErrorInsufficientDriver": "Install an NVIDIA driver that knows this CUDA version.",
    "cudaErrorNoDevice": "Run it on a machine with an NVIDIA GPU.",
}


def as_contiguous(value: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return a value as a contiguous array of a type, copied only where it has to be."""
    return np.ascontiguousarray(np.asarray(value), dtype=dtype)
