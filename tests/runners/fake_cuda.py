"""A CUDA runtime without a GPU: device memory is host memory, a graph is a list of calls."""

# ruff: noqa: N801, N802, N815  the names are CUDA's

import ctypes
from collections.abc import Callable
from enum import IntEnum
from typing import Any


class Status(IntEnum):
    OK = 0
    OUT_OF_MEMORY = 2
    CAPTURE_INVALID = 901


NAMES = {
    Status.OK: b"cudaSuccess",
    Status.OUT_OF_MEMORY: b"cudaErrorMemoryAllocation",
    Status.CAPTURE_INVALID: b"cudaErrorStreamCaptureInvalidated",
}


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class FakeCudart:
    """The functions of cuda.bindings.runtime that CudaDevice calls.

    Attributes:
        calls: Names of the functions called, in order.
        memory: Buffers that are allocated, by address.
        fail: Status to return, by function.
        recording: Calls of the capture that is going on; None outside one.
    """

    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = cudaStreamCaptureMode

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.memory: dict[int, Any] = {}
        self.fail: dict[str, Status] = {}
        self.streams: set[int] = set()
        self.recording: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.executables: dict[int, list[Callable[[], None]]] = {}
        self._next = 1

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if not name.startswith("cuda"):
            raise AttributeError(name)
        handler = getattr(self, f"_{name}")

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            status = self.fail.get(name, Status.OK)
            if status:
                if name == "cudaStreamEndCapture":
                    self.recording = None  # a capture ends even where it has failed
                return (status, None)
            result = handler(*arguments)
            return (Status.OK,) if result is None else (Status.OK, result)

        return call

    def count(self, name: str) -> int:
        return self.calls.count(name)

    def enqueue(self, work: Callable[[], None]) -> None:
        """What a library does to put work into the stream."""
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def _handle(self) -> int:
        self._next += 1
        return self._next

    def _cudaStreamCreate(self) -> int:
        self.streams.add(stream := self._handle())
        return stream

    def _cudaStreamDestroy(self, stream: int) -> None:
        self.streams.remove(stream)

    def _cudaMalloc(self, num_bytes: int) -> int:
        buffer = ctypes.create_string_buffer(b"\xab" * num_bytes, num_bytes)
        address = ctypes.addressof(buffer)
        self.memory[address] = buffer
        return address

    def _cudaFree(self, pointer: int) -> None:
        del self.memory[pointer]

    def _cudaMemcpyAsync(self, to: int, source: int, count: int, kind: int, stream: int) -> None:
        assert stream in self.streams
        device = to if kind == cudaMemcpyKind.cudaMemcpyHostToDevice else source
        assert count <= len(self.memory[device])
        ctypes.memmove(to, source, count)

    def _cudaStreamSynchronize(self, stream: int) -> None:
        assert stream in self.streams
        assert self.recording is None, "waits inside a capture"

    def _cudaStreamBeginCapture(self, stream: int, _mode: int) -> None:
        assert stream in self.streams
        self.recording = []

    def _cudaStreamEndCapture(self, _stream: int) -> int:
        assert self.recording is not None
        graph = self._handle()
        self.graphs[graph], self.recording = self.recording, None
        return graph

    def _cudaGraphInstantiate(self, graph: int, _flags: int) -> int:
        executable = self._handle()
        self.executables[executable] = self.graphs[graph]
        return executable

    def _cudaGraphDestroy(self, graph: int) -> None:
        del self.graphs[graph]

    def _cudaGraphExecDestroy(self, executable: int) -> None:
        del self.executables[executable]

    def _cudaGraphLaunch(self, executable: int, _stream: int) -> None:
        for work in self.executables[executable]:
            work()

    def _cudaGetLastError(self) -> None:
        return None

    def _cudaGetErrorName(self, status: Status) -> bytes:
        return NAMES[status]

    def _cudaGetErrorString(self, _status: Status) -> bytes:
        return b"as the test asked for"
