"""TensorRT and TensorRT-RTX engines.

Entering checks the engine's manifest, loads the runtime with our plugins, deserializes and opens a
stream; nothing touches the GPU before. Each set of input shapes gets, at its first call, its own
execution context, its device buffers and, after one plain run, a CUDA graph. Later calls of these
shapes copy the inputs, launch the graph and copy the outputs; they allocate nothing. A context of
its own per set of shapes costs its activations' memory, and makes sure that no graph refers to
another one's shapes.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from treeq_export.errors import RunnerError
from treeq_export.ops import DOMAIN, PLUGIN_VERSION, QLINEAR
from treeq_export.reading import read_bytes
from treeq_export.runners.cpu_kernels import find_library
from treeq_export.runners.cuda_device import CudaDevice, as_contiguous
from treeq_export.runners.engine_manifest import ENGINE_FILE, check_manifest
from treeq_export.runners.tensorrt_library import Runtime, RuntimeName, load_runtime
from treeq_export.runners.tensorrt_plugin import register_plugins

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)

PLUGIN_LIBRARY = "libtreeq_plugins.so"
Shapes = tuple[tuple[int, ...], ...]
_NUMPY_TYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT32": "int32",
    "INT64": "int64",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class Binding:
    """One input or output of an engine.

    Attributes:
        name: Name of the tensor.
        dtype: NumPy type of the tensor.
        low: Smallest shape of the profile; of outputs the shape with -1 where it is dynamic.
        high: Largest shape of the profile; as `low` for outputs.
    """

    name: str
    dtype: np.dtype[Any]
    low: tuple[int, ...]
    high: tuple[int, ...]


@dataclass(frozen=True)
class OpenedEngine:
    """A deserialized engine, and what has to live as long as it does."""

    engine: Any
    owners: tuple[Any, ...] = ()


@dataclass
class _Prepared:
    """What one set of input shapes needs.

    Attributes:
        context: Execution context of the engine.
        pointers: Device address by binding name.
        outputs: Host array by output name.
        graph: The captured graph; None before the second call, or where it cannot be captured.
        graph_error: Why it cannot be captured.
        num_runs: Calls so far.
    """

    context: Any
    pointers: dict[str, int]
    outputs: dict[str, NDArray[Any]]
    graph: Any = None
    graph_error: str | None = None
    num_runs: int = field(default=0)


class TensorrtRunner:
    """Runs a built engine; it exists on the GPU only while the runner is entered.

    Args:
        folder: Folder of the engine and its manifest, as the build stage writes it.
        runtime: "tensorrt" or "tensorrt-rtx".
        use_graphs: Whether calls after the first of a shape launch a CUDA graph.
        gpu: Architecture that the engine has to be for, such as "sm_89"; None asks the driver.
        device: Device to allocate and launch on; None opens a stream of the current GPU.
    """

    def __init__(
        self,
        folder: Path,
        runtime: RuntimeName = "tensorrt",
        *,
        use_graphs: bool = True,
        gpu: str | None = None,
        device: CudaDevice | None = None,
    ) -> None:
        self.folder = folder
        self.runtime: RuntimeName = runtime
        self.use_graphs = use_graphs
        self.gpu = gpu
        self._device = device or CudaDevice()
        self._opened: OpenedEngine | None = None
        self._inputs: dict[str, Binding] = {}
        self._outputs: dict[str, Binding] = {}
        self._prepared: dict[Shapes, _Prepared] = {}

    def __enter__(self) -> Self:
        opened = open_engine(self.folder, self.runtime, self.gpu)
        self._inputs, self._outputs = read_bindings(opened.engine, self.folder)
        self._device.__enter__()
        self._opened = opened
        return self

    def __exit__(self, *error: object) -> None:
        # Contexts go before the engine, and both before the memory that they were given.
        self._prepared.clear()
        self._opened = None
        self._device.__exit__(*error)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in order; the runner has to be entered."""
        return tuple(self._inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order; the runner has to be entered."""
        return tuple(self._outputs)

    @property
    def graph_shapes(self) -> list[Shapes]:
        """The input shapes for which a CUDA graph was captured."""
        return [shapes for shapes, entry in self._prepared.items() if entry.graph is not None]

    def run(self, inputs: Mapping[str, "NDArray[Any] | Tensor"]) -> NDArray[np.float32]:
        """Return the first output of named inputs, each with a leading batch axis."""
        return self.run_all(inputs)[self.output_names[0]].astype(np.float32, copy=False)

    def run_all(self, inputs: Mapping[str, "NDArray[Any] | Tensor"]) -> dict[str, NDArray[Any]]:
        """Return every output by name, in the engine's types.

        Raises:
            RunnerError: The runner is not entered; an input is missing, of another kind of number,
                or outside the profile; or the GPU fails.
        """
        if self._opened is None:
            raise RunnerError("TensorrtRunner: not entered. Use it in a with statement.")
        feeds = {name: self._convert(binding, inputs) for name, binding in self._inputs.items()}
        shapes = tuple(array.shape for array in feeds.values())
        entry = self._prepared.get(shapes)
        if entry is None:
            entry = self._prepared[shapes] = self._prepare(feeds)
        for name, array in feeds.items():
            self._device.upload(entry.pointers[name], array)
        self._launch(entry)
        for name, array in entry.outputs.items():
            self._device.download(array, entry.pointers[name])
        self._device.synchronize()
        return {name: array.copy() for name, array in entry.outputs.items()}

    def _convert(
        self, binding: Binding, inputs: Mapping[str, "NDArray[Any] | Tensor"]
    ) -> NDArray[Any]:
        """Return an input in the engine's type; numbers change their width, never their kind."""
        if binding.name not in inputs:
            raise RunnerError(
                f"{self.folder}: input {binding.name} is missing. "
                f"Give all of {', '.join(self._inputs)}."
            )
        array = np.asarray(inputs[binding.name])
        wanted = binding.dtype
        if array.dtype.kind != wanted.kind:
            raise RunnerError(
                f"{self.folder}: input {binding.name} is {array.dtype}, expected {wanted}."
            )
        if wanted.kind in "iu" and array.size:
            limits = np.iinfo(wanted)
            if array.min() < limits.min or array.max() > limits.max:
                raise RunnerError(
                    f"{self.folder}: input {binding.name} holds {array.min()}..{array.max()}, "
                    f"which {wanted} does not."
                )
        _check_profile(self.folder, binding, array.shape)
        return as_contiguous(array, wanted)

    def _prepare(self, feeds: Mapping[str, NDArray[Any]]) -> _Prepared:
        """Make context and buffers for one set of input shapes."""
        assert self._opened is not None
        context = self._opened.engine.create_execution_context()
        if context is None:
            raise RunnerError(
                f"{self.folder}: no execution context. The GPU has too little free memory; "
                "close other programs, or build for a smaller batch."
            )
        for name, array in feeds.items():
            if not context.set_input_shape(name, array.shape):
                raise RunnerError(f"{self.folder}: input {name}: shape {array.shape} is refused.")
        outputs: dict[str, NDArray[Any]] = {}
        for name, binding in self._outputs.items():
            shape = tuple(context.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                raise RunnerError(
                    f"{self.folder}: output {name}: shape {shape} depends on the data; expected "
                    "one that follows from the inputs. Build the compiled graph again."
                )
            outputs[name] = np.empty(shape, binding.dtype)
        pointers: dict[str, int] = {}
        for name, array in (*feeds.items(), *outputs.items()):
            pointers[name] = self._device.allocate(array.nbytes)
            context.set_tensor_address(name, pointers[name])
        return _Prepared(context, pointers, outputs)

    def _launch(self, entry: _Prepared) -> None:
        """Run plainly the first time, capture at the second, launch the graph from then on."""
        entry.num_runs += 1
        wanted = self.use_graphs and entry.num_runs > 1 and entry.graph_error is None
        if wanted and entry.graph is None:
            self._capture(entry)
        if entry.graph is not None:
            self._device.launch(entry.graph)
        else:
            self._enqueue(entry)

    def _capture(self, entry: _Prepared) -> None:
        """Capture a graph; an engine that cannot be captured goes on without, and says so once."""
        check = getattr(entry.context, "is_stream_capturable", None)
        if check is not None and not check(self._device.stream):
            entry.graph_error = "the engine says that its stream cannot be captured"
        else:
            try:
                entry.graph = self._device.capture(lambda: self._enqueue(entry))
            except RunnerError as error:
                entry.graph_error = str(error)
        if entry.graph_error is not None:
            _log.warning("%s: runs without a CUDA graph: %s", self.folder, entry.graph_error)

    def _enqueue(self, entry: _Prepared) -> None:
        if not entry.context.execute_async_v3(self._device.stream):
            raise RunnerError(
                f"{self.folder}: {self.runtime} cannot run the engine; its own message is above. "
                "Build it again on this machine."
            )


def open_engine(folder: Path, runtime_name: RuntimeName, gpu: str | None) -> OpenedEngine:
    """Check an engine's manifest, load its runtime and our plugins, and deserialize it.

    Args:
        folder: The engine's folder.
        runtime_name: What it was built with.
        gpu: Same as `gpu` of `TensorrtRunner`.

    Raises:
        RunnerError: The manifest does not fit this machine, or the engine is refused.
    """
    runtime = load_runtime(runtime_name)
    load_plugins(runtime)
    check_manifest(folder, runtime, gpu=gpu)
    trt = runtime.module
    logger = trt.Logger(trt.Logger.ERROR)
    deserializer = trt.Runtime(logger)
    data = read_bytes(
        folder / ENGINE_FILE, error=RunnerError, remedy="Build it again.", max_bytes=1 << 36
    )
    engine = deserializer.deserialize_cuda_engine(data)
    if engine is None:
        raise RunnerError(
            f"{folder}: {runtime.name} {runtime.version} refuses the engine; its own message is "
            "above. Build it again on this machine."
        )
    return OpenedEngine(engine, (deserializer, logger))


def load_plugins(runtime: Runtime) -> str:
    """Register our plugins: the C++ library where it is installed, else the classes in Python.

    Returns:
        Where they come from: the library's path, "python", or "registered" where they were there.
    """
    registry = runtime.module.get_plugin_registry()
    if registry.get_creator(QLINEAR.name, PLUGIN_VERSION, DOMAIN) is not None:
        return "registered"
    library = find_library(PLUGIN_LIBRARY)
    if library is not None and registry.load_library(str(library)) is not None:
        return str(library)
    register_plugins(runtime)
    return "python"


def read_bindings(engine: Any, folder: Path) -> tuple[dict[str, Binding], dict[str, Binding]]:
    """Return an engine's inputs and outputs by name, in its order.

    Raises:
        RunnerError: One has a type that numpy does not have.
    """
    inputs: dict[str, Binding] = {}
    outputs: dict[str, Binding] = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = engine.get_tensor_dtype(name).name
        if kind not in _NUMPY_TYPES:
            raise RunnerError(
                f"{folder}: {name} is {kind}, expected one of {', '.join(_NUMPY_TYPES)}. "
                "Compile and build again."
            )
        dtype = np.dtype(_NUMPY_TYPES[kind])
        if engine.get_tensor_mode(name).name == "INPUT":
            low, _, high = engine.get_tensor_profile_shape(name, 0)
            inputs[name] = Binding(name, dtype, tuple(low), tuple(high))
        else:
            shape = tuple(engine.get_tensor_shape(name))
            outputs[name] = Binding(name, dtype, shape, shape)
    return inputs, outputs


def _check_profile(folder: Path, binding: Binding, shape: tuple[int, ...]) -> None:
    fits = len(shape) == len(binding.low) and all(
        low <= size <= high
        for low, size, high in zip(binding.low, shape, binding.high, strict=True)
    )
    if not fits:
        raise RunnerError(
            f"{folder}: input {binding.name}: received shape {shape}, the engine's profile takes "
            f"{binding.low} to {binding.high}. Split the batch, or set compile.max_batch in the "
            "recipe and build again."
        )
