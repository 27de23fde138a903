"""TensorRT's linears of the GPU benchmark, without a GPU: graphs, RTX's layers, what is missing."""

import ctypes
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from treeq_export.engines.layer_list import EngineLayer
from treeq_export.errors import RunnerError

BENCH = Path(__file__).parents[2] / "kernels" / "bench"
K, N = 1152, 384


@pytest.fixture
def contenders(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module gpu_tensorrt."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    yield importlib.import_module("gpu_tensorrt")
    for name in [name for name in sys.modules if name.startswith("gpu_")]:
        del sys.modules[name]


def make_linear(contenders: Any, name: str, m: int = 64) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Return a graph, its x (M, K) and what y (M, N) should be."""
    x, weight, bias = contenders.make_float_linear(m, K, N)
    model = contenders.make_graph(name, weight.numpy(), bias.numpy(), float(x.abs().max()))
    return model, x, torch.nn.functional.linear(x, weight, bias)


def build(contenders: Any, name: str, folder: Path, gpu: str = "sm_89") -> list[EngineLayer]:
    return contenders.build(make_linear(contenders, name)[0], folder, "tensorrt-rtx", gpu)


def product_of(layers: list[EngineLayer]) -> EngineLayer:
    [product] = [layer for layer in layers if "product" in layer.nodes]
    assert product.is_product
    return product


class TestBuiltByTensorrtRtx:
    def test_fp16_is_one_half_product_with_its_bias(self, contenders: Any, tmp_path: Path):
        product = product_of(build(contenders, "tensorrt_fp16", tmp_path))
        assert set(product.input_types) == {"Half"}
        assert set(product.constant_types) == {"Half"}
        assert "bias" in product.nodes
        assert (tmp_path / "model.engine").stat().st_size > 2 * K * N

    def test_fp8_has_an_fp8_product(self, contenders: Any, tmp_path: Path):
        product = product_of(build(contenders, "tensorrt_fp8", tmp_path))
        assert product.input_types == ("FP8",)
        assert "FP8" in product.constant_types  # the weight; the others are scales
        assert set(product.constant_types) <= {"FP8", "Float"}
        assert product.kind == "gemm"
        assert K * N < (tmp_path / "model.engine").stat().st_size < 2 * K * N

    def test_fp8_is_refused_before_ada(self, contenders: Any, tmp_path: Path):
        with pytest.raises(RunnerError, match=r"builds no engine for sm_80.*fp8_e4m3"):
            build(contenders, "tensorrt_fp8", tmp_path, "sm_80")


@pytest.mark.parametrize(("name", "least_db"), [("tensorrt_fp16", 55), ("tensorrt_fp8", 26)])
def test_graphs_compute_the_linear(contenders: Any, name: str, least_db: float):
    model, x, expected = make_linear(contenders, name)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, {"x": x.numpy().astype(np.float16)})
    assert contenders.sqnr_db(expected, torch.from_numpy(np.asarray(y))) > least_db


class TestMissing:
    def test_without_the_package_both_are_named(
        self, contenders: Any, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        found = contenders.open_opponents(K, N, torch.device("cpu"))
        reason = "package tensorrt is not installed"
        assert found.missing == {"tensorrt_fp16": reason, "tensorrt_fp8": reason}
        assert found.linears == {}

    def test_fp8_needs_ada(self, contenders: Any, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
        why = contenders.why_missing
        assert why("tensorrt_fp16", "sm_80") is None
        assert "sm_80 has no FP8 product" in why("tensorrt_fp8", "sm_80")
        assert [why("tensorrt_fp8", gpu) for gpu in ("sm_89", "sm_90", "sm_120")] == [None] * 3
        assert why("tensorrt_fp16", "") == "needs a GPU"

    def test_what_the_builder_refuses_is_named(
        self, contenders: Any, monkeypatch: pytest.MonkeyPatch
    ):
        def refuse(*_: object) -> None:
            raise RunnerError("tensorrt builds\nno engine")

        monkeypatch.setattr(contenders, "why_missing", lambda *_: None)
        monkeypatch.setattr(contenders, "build", refuse)
        found = contenders.open_opponents(64, 32, torch.device("cpu"))
        assert found.missing == dict.fromkeys(contenders.NAMES, "tensorrt builds no engine")


class FakeContext:
    """Stands for an execution context: it copies a constant into y, and keeps what it was told."""

    def __init__(self, y: torch.Tensor, *, runs: bool = True) -> None:
        self.y, self.runs = y, runs
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.streams: list[int] = []

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        size = self.y.numel() * self.y.element_size()
        ctypes.memmove(self.addresses["y"], self.y.data_ptr(), size)
        return self.runs


class TestEnqueue:
    @pytest.fixture
    def arrays(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((5, 64), (32, 64), (32,))
        return [torch.randn(shape, generator=generator).half() for shape in shapes]

    @pytest.fixture
    def opened(self, contenders: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
        """A function: context -> Opponents whose FP16 linear has it."""
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
        trt = SimpleNamespace(Logger=lambda _: None)
        vars(trt.Logger)["ERROR"] = 0

        def make(context: FakeContext | None, folder: Path) -> Any:
            engine = SimpleNamespace(create_execution_context=lambda: context)
            trt.Runtime = lambda _: SimpleNamespace(deserialize_cuda_engine=lambda _: engine)
            runtime = SimpleNamespace(module=trt)
            monkeypatch.setattr(contenders, "load_runtime", lambda _: runtime)
            (folder / "model.engine").write_bytes(b"engine")
            linear = contenders.EngineLinear(folder, 32)
            return contenders.Opponents({"tensorrt_fp16": linear}, {"tensorrt_fp8": "sm_80"})

        return make

    def test_it_runs_on_torchs_stream(
        self, opened: Any, arrays: list[torch.Tensor], tmp_path: Path
    ):
        expected = torch.nn.functional.linear(*arrays)
        context = FakeContext(expected)
        plain: dict[str, Any] = {}
        missing: dict[str, str] = {}
        opened(context, tmp_path).add_to(plain, missing, arrays)
        assert missing == {"tensorrt_fp8": "sm_80"}
        y = plain["tensorrt_fp16"]()
        assert torch.equal(y, expected)
        assert context.shapes == {"x": (5, 64)}
        assert context.addresses == {"x": arrays[0].data_ptr(), "y": y.data_ptr()}
        assert context.streams == [7, 7]

    @pytest.mark.parametrize(
        ("context", "why"),
        [
            (FakeContext(torch.ones((5, 32)).half()), "its output is wrong"),
            (FakeContext(torch.ones((5, 32)).half(), runs=False), "cannot run"),
            (None, "takes no x"),
        ],
    )
    def test_what_is_wrong_is_not_timed(
        self,
        opened: Any,
        arrays: list[torch.Tensor],
        tmp_path: Path,
        context: FakeContext | None,
        why: str,
    ):
        plain: dict[str, Any] = {}
        missing: dict[str, str] = {}
        opened(context, tmp_path).add_to(plain, missing, arrays)
        assert plain == {}
        assert why in missing["tensorrt_fp16"]


@pytest.mark.parametrize("name", ["tensorrt_fp16", "w3a3"])
def test_only_an_opponent_may_fail_to_be_captured(
    contenders: Any, monkeypatch: pytest.MonkeyPatch, name: str
):
    def refuse(call: Any) -> Any:
        if call is broken:
            raise RuntimeError("operation not permitted\nwhen capturing")
        return call

    def broken() -> None:
        pass

    def works() -> None:
        pass

    module = importlib.import_module("gpu_contenders")
    monkeypatch.setattr(module, "capture_graph", refuse)
    missing: dict[str, str] = {}
    plain = {name: broken, "fp16": works}
    if name == "w3a3":
        with pytest.raises(RuntimeError, match="not permitted"):
            module.capture_all(plain, missing)
        return
    assert module.capture_all(plain, missing) == {"fp16": works}
    assert missing == {name: "cannot be captured: operation not permitted when capturing"}
