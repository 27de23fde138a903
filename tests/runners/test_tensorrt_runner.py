"""The TensorRT runner's own logic, with a fake engine over a fake CUDA runtime."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.runners.fake_cuda import FakeCudart, Status
from treeq_export.errors import RunnerError
from treeq_export.runners import tensorrt_runner
from treeq_export.runners.cuda_bindings import load_cudart
from treeq_export.runners.cuda_device import CudaDevice
from treeq_export.runners.tensorrt_library import Runtime
from treeq_export.runners.tensorrt_runner import (
    OpenedEngine,
    TensorrtRunner,
    load_plugins,
    open_engine,
)

DTYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32}


class FakeContext:
    """Computes y = x + label (half) and z = 2 x from the addresses that it is given."""

    def __init__(self, engine: "FakeEngine") -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return not self.engine.refuses_shapes

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 2) if self.engine.unknown_shape else self.shapes["x"]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        assert stream in self.engine.cudart.streams
        return self.engine.capturable

    def execute_async_v3(self, stream: int) -> bool:
        assert stream in self.engine.cudart.streams
        self.engine.num_executions += 1
        if self.engine.fails:
            return False
        self.engine.cudart.enqueue(self.compute)
        return True

    def compute(self) -> None:
        x, label = self.read("x", np.float16), self.read("label", np.int32)
        self.write("y", x + label[:, None].astype(np.float16))
        self.write("z", 2 * x.astype(np.float32))

    def read(self, name: str, dtype: Any) -> NDArray[Any]:
        shape = self.shapes[name]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(ctypes.string_at(self.addresses[name], size), dtype).reshape(shape)

    def write(self, name: str, array: NDArray[Any]) -> None:
        ctypes.memmove(self.addresses[name], array.tobytes(), array.nbytes)


class FakeEngine:
    """Inputs x (1..4, 2) half and label (1..4,) int32; outputs y half and z float."""

    tensors = {  # noqa: RUF012
        "x": ("INPUT", "HALF", [(1, 2), (2, 2), (4, 2)]),
        "label": ("INPUT", "INT32", [(1,), (2,), (4,)]),
        "y": ("OUTPUT", "HALF", (-1, 2)),
        "z": ("OUTPUT", "FLOAT", (-1, 2)),
    }

    def __init__(self, cudart: FakeCudart) -> None:
        self.cudart = cudart
        self.contexts: list[FakeContext] = []
        self.num_executions = 0
        self.refuses_shapes = self.unknown_shape = self.fails = self.no_memory = False
        self.capturable = True
        self.types: dict[str, str] = {}

    num_io_tensors = 4

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.types.get(name, self.tensors[name][1]))

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name=self.tensors[name][0])

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        assert profile == 0
        return self.tensors[name][2]

    def get_tensor_shape(self, name: str) -> Any:
        return self.tensors[name][2]

    def create_execution_context(self) -> FakeContext | None:
        if self.no_memory:
            return None
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


@pytest.fixture
def cudart() -> FakeCudart:
    return FakeCudart()


@pytest.fixture
def engine(cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    engine = FakeEngine(cudart)
    monkeypatch.setattr(tensorrt_runner, "open_engine", lambda *_: OpenedEngine(engine))
    return engine


@pytest.fixture
def make_runner(engine: FakeEngine, cudart: FakeCudart) -> Callable[..., TensorrtRunner]:
    def make(**options: Any) -> TensorrtRunner:
        return TensorrtRunner(Path("engines/x"), device=CudaDevice(cudart), **options)

    return make


def make_inputs(batch: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.integers(-9, 9, (batch, 2)).astype(np.float32),
        "label": torch.arange(batch),  # int64, which the engine takes as int32
    }


def check(results: dict[str, NDArray[Any]], inputs: dict[str, Any]) -> None:
    label = np.asarray(inputs["label"])[:, None]
    np.testing.assert_array_equal(results["y"], inputs["x"] + label)
    np.testing.assert_array_equal(results["z"], 2 * inputs["x"])
    assert results["y"].dtype == np.float16


def test_nothing_is_touched_before_entering(make_runner: Any, cudart: FakeCudart):
    runner = make_runner()
    assert cudart.calls == []
    with pytest.raises(RunnerError, match="not entered"):
        runner.run(make_inputs(2))
    with runner:
        assert runner.input_names == ("x", "label")
        assert runner.output_names == ("y", "z")
        assert cudart.count("cudaMalloc") == 0
        received = runner.run(make_inputs(2))
        assert received.dtype == np.float32
    with pytest.raises(RunnerError, match="not entered"):
        runner.run(make_inputs(2))


@pytest.mark.parametrize("use_graphs", [True, False])
def test_results_of_every_call(make_runner: Any, cudart: FakeCudart, use_graphs: bool):
    """The first call, the captured one and replays, over two shapes that take turns."""
    with make_runner(use_graphs=use_graphs) as runner:
        kept = []
        for seed in range(4):
            for batch in (2, 3):
                inputs = make_inputs(batch, seed)
                results = runner.run_all(inputs)
                check(results, inputs)
                kept.append((inputs, results))
        for inputs, results in kept:  # no call writes into another one's results
            check(results, inputs)
    assert cudart.count("cudaGraphLaunch") == (6 if use_graphs else 0)


def test_buffers_are_allocated_once_a_shape(make_runner: Any, cudart: FakeCudart):
    with make_runner() as runner:
        for _ in range(5):
            runner.run(make_inputs(2))
        assert cudart.count("cudaMalloc") == 4
        runner.run(make_inputs(4))
        assert cudart.count("cudaMalloc") == 8
        runner.run(make_inputs(2))
        assert cudart.count("cudaMalloc") == 8


def test_one_graph_a_shape_after_a_plain_run(
    make_runner: Any, cudart: FakeCudart, engine: FakeEngine
):
    with make_runner() as runner:
        runner.run(make_inputs(2))
        assert runner.graph_shapes == []
        runner.run(make_inputs(2))
        assert runner.graph_shapes == [((2, 2), (2,))]
        assert engine.num_executions == 2
        for _ in range(3):
            runner.run(make_inputs(2))
        assert engine.num_executions == 2
        assert cudart.count("cudaGraphInstantiate") == 1
        assert cudart.count("cudaGraphLaunch") == 4
        assert len(engine.contexts) == 1
    assert cudart.graphs == {}


def test_everything_is_freed(make_runner: Any, cudart: FakeCudart):
    with make_runner() as runner:
        for _ in range(2):
            runner.run(make_inputs(2))
        assert len(cudart.memory) == 4
        assert len(cudart.executables) == 1
    assert cudart.memory == {}
    assert cudart.executables == {}
    assert cudart.streams == set()


def test_a_runner_can_be_entered_again(make_runner: Any):
    runner = make_runner()
    for _ in range(2):
        with runner:
            for _ in range(2):
                inputs = make_inputs(3)
                check(runner.run_all(inputs), inputs)


@pytest.mark.parametrize("function", ["cudaMalloc", "cudaMemcpyAsync", "cudaStreamSynchronize"])
def test_a_failure_is_one_line_and_frees_everything(
    make_runner: Any, cudart: FakeCudart, function: str
):
    message = f"^CUDA: {function} failed: cudaErrorMem"
    with make_runner() as runner:
        runner.run(make_inputs(2))
        cudart.fail[function] = Status.OUT_OF_MEMORY
        with pytest.raises(RunnerError, match=message) as caught:
            runner.run(make_inputs(3))
    assert "Use a smaller batch" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert cudart.memory == {}
    assert cudart.streams == set()


def test_an_engine_that_cannot_be_opened_leaves_nothing(
    cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> Any:
        raise RunnerError("engines/x: built for sm_80.")

    monkeypatch.setattr(tensorrt_runner, "open_engine", refuse)
    runner = TensorrtRunner(Path("engines/x"), device=CudaDevice(cudart))
    with pytest.raises(RunnerError, match="built for"), runner:
        pass
    assert cudart.streams == set()


@pytest.mark.parametrize("reason", ["capturable", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_an_engine_that_cannot_be_captured_goes_on_plainly(
    make_runner: Any,
    cudart: FakeCudart,
    engine: FakeEngine,
    reason: str,
    caplog: pytest.LogCaptureFixture,
):
    if reason == "capturable":
        engine.capturable = False
    else:
        cudart.fail[reason] = Status.CAPTURE_INVALID
    with make_runner() as runner:
        for seed in range(4):
            inputs = make_inputs(2, seed)
            check(runner.run_all(inputs), inputs)
        assert runner.graph_shapes == []
    assert len(caplog.messages) == 1
    assert "engines/x: runs without a CUDA graph: " in caplog.text
    assert cudart.graphs == {}


def test_a_failure_inside_a_capture_ends_the_capture(make_runner: Any, cudart: FakeCudart):
    device = CudaDevice(cudart)

    def enqueue() -> None:
        raise KeyboardInterrupt

    with device:
        with pytest.raises(KeyboardInterrupt):
            device.capture(enqueue)
        assert cudart.recording is None
        assert cudart.graphs == {}
        device.synchronize()


GOOD = np.ones((2, 2), np.float32)
LABEL = np.arange(2)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": GOOD}, "input label is missing. Give all of x, label."),
        ({"x": np.ones((5, 2), np.float32), "label": np.arange(5)}, "(1, 2) to (4, 2). Split"),
        ({"x": np.ones((0, 2), np.float32), "label": np.arange(0)}, "received shape (0, 2)"),
        ({"x": np.ones((2, 3), np.float32), "label": LABEL}, "received shape (2, 3)"),
        ({"x": np.ones(2, np.float32), "label": LABEL}, "received shape (2,)"),
        ({"x": GOOD, "label": LABEL.astype(np.float32)}, "label is float32, expected int32"),
        ({"x": GOOD.astype(np.int8), "label": LABEL}, "x is int8, expected float16"),
        ({"x": GOOD, "label": LABEL + (1 << 40)}, "1099511627777, which int32 does not"),
    ],
)
def test_wrong_inputs_are_errors(make_runner: Any, inputs: dict[str, Any], message: str):
    with make_runner() as runner:
        with pytest.raises(RunnerError, match=r"^engines/x: ") as caught:
            runner.run(inputs)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        good = make_inputs(2)
        check(runner.run_all(good), good)  # it still runs afterwards


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("refuses_shapes", "shape (2, 2) is refused"),
        ("unknown_shape", "depends on the data"),
        ("fails", "cannot run the engine"),
        ("no_memory", "too little free memory"),
    ],
)
def test_faults_of_the_engine(make_runner: Any, engine: FakeEngine, fault: str, message: str):
    setattr(engine, fault, True)
    with (
        pytest.raises(RunnerError, match=r"^engines/x: ") as caught,
        make_runner() as runner,
    ):
        runner.run(make_inputs(2))
    assert message in str(caught.value)
    assert engine.cudart.memory == {}


def test_a_type_that_numpy_does_not_have(make_runner: Any, engine: FakeEngine):
    engine.types["x"] = "FP4"
    with pytest.raises(RunnerError, match=r"x is FP4, expected one of FLOAT, "), make_runner():
        pass
    assert engine.cudart.streams == set()


def test_cuda_python_is_what_is_called():
    """Every function of the fake is one of cuda-python's."""
    runtime = load_cudart()
    names = [name[1:] for name in vars(FakeCudart) if name.startswith("_cuda")]
    assert len(names) > 10
    assert all(hasattr(runtime, name) for name in names)
    assert hasattr(runtime.cudaMemcpyKind, "cudaMemcpyHostToDevice")
    assert hasattr(runtime.cudaMemcpyKind, "cudaMemcpyDeviceToHost")
    assert hasattr(runtime.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal")


def test_without_a_gpu_entering_is_one_line(engine: FakeEngine):
    if torch.cuda.is_available():
        with CudaDevice() as device:
            assert device.stream
        return
    with pytest.raises(RunnerError, match=r"^CUDA: cudaStreamCreate failed: cudaError") as caught:
        TensorrtRunner(Path("engines/x")).__enter__()
    assert "\n" not in str(caught.value)


class FakeTensorrt:
    """What open_engine and load_plugins call of TensorRT."""

    def __init__(self, *, engine: object = None, library: object = None) -> None:
        self.engine, self.library = engine, library
        self.creators: set[str] = set()
        self.loaded: list[str] = []

    class Logger:
        ERROR = 1

        def __init__(self, level: int) -> None:
            assert level == self.ERROR

    def Runtime(self, logger: Logger) -> Any:  # noqa: N802
        assert isinstance(logger, self.Logger)
        return SimpleNamespace(deserialize_cuda_engine=lambda data: data and self.engine)

    def get_plugin_registry(self) -> Any:
        def load_library(path: str) -> object:
            self.loaded.append(path)
            return self.library

        return SimpleNamespace(
            get_creator=lambda name, *_: name if name in self.creators else None,
            load_library=load_library,
        )


@pytest.fixture
def use_tensorrt(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeTensorrt], Runtime]:
    def use(module: FakeTensorrt) -> Runtime:
        runtime = Runtime("tensorrt-rtx", module, "1.7")
        monkeypatch.setattr(tensorrt_runner, "load_runtime", lambda _name: runtime)
        return runtime

    return use


class TestOpening:
    def test_the_manifest_is_checked_after_the_plugins_are_there(
        self, use_tensorrt: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ):
        module = FakeTensorrt(engine="engine")
        runtime = use_tensorrt(module)
        events: list[Any] = []
        monkeypatch.setattr(tensorrt_runner, "load_plugins", lambda r: events.append(r))
        monkeypatch.setattr(
            tensorrt_runner, "check_manifest", lambda f, r, gpu: events.append((f, r, gpu))
        )
        (tmp_path / "model.engine").write_bytes(b"data")
        opened = open_engine(tmp_path, "tensorrt-rtx", "sm_80")
        assert events == [runtime, (tmp_path, runtime, "sm_80")]
        assert opened.engine == "engine"
        assert len(opened.owners) == 2

    def test_an_engine_that_the_runtime_refuses(
        self, use_tensorrt: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ):
        use_tensorrt(FakeTensorrt(engine=None))
        for name in ("load_plugins", "check_manifest"):
            monkeypatch.setattr(tensorrt_runner, name, lambda *_, **__: None)
        (tmp_path / "model.engine").write_bytes(b"data")
        with pytest.raises(RunnerError, match=r"tensorrt-rtx 1\.7 refuses the engine"):
            open_engine(tmp_path, "tensorrt-rtx", None)

    @pytest.mark.parametrize("library", [None, "broken", "good"])
    def test_where_plugins_come_from(
        self,
        library: str | None,
        use_tensorrt: Any,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ):
        module = FakeTensorrt(library=object() if library == "good" else None)
        runtime = use_tensorrt(module)
        registered: list[Runtime] = []
        monkeypatch.setattr(tensorrt_runner, "register_plugins", registered.append)
        monkeypatch.setenv("TREEQ_LIBRARIES", str(tmp_path))
        path = tmp_path / "libtreeq_plugins.so"
        if library is not None:
            path.touch()
        expected = str(path) if library == "good" else "python"
        assert load_plugins(runtime) == expected
        assert registered == ([] if library == "good" else [runtime])
        assert module.loaded == ([] if library is None else [str(path)])
        module.creators = {"QLinear"}
        assert load_plugins(runtime) == "registered"
