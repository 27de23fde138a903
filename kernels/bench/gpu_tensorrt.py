"""TensorRT's own linear in FP16 and FP8, as opponents of our kernels. Unmeasured: needs a GPU.

One ONNX graph per shape, y = x W + b with x (M, K) and y (M, N) in fp16. In FP8 both operands pass
through E4M3 with one scale per tensor, absmax / 448: x by QuantizeLinear and DequantizeLinear, W as
an FP8 constant by DequantizeLinear. The build stage's child process builds it, strongly typed, with
M from 1 to the largest number of tokens; without a GPU TensorRT-RTX builds the same graphs.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from gpu_cases import TOKENS, make_float_linear
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional

from treeq_export.errors import RunnerError, TreeqError
from treeq_export.runners.tensorrt_library import RuntimeName, load_runtime

if TYPE_CHECKING:
    from treeq_export.engines.layer_list import EngineLayer

FP16, FP8 = "tensorrt_fp16", "tensorrt_fp8"
NAMES = (FP16, FP8)
OPT_TOKENS = 1024  # the shape that the builder tunes for
E4M3_MAX = 448.0
MIN_SQNR_DB = 20.0  # E4M3 with one scale per tensor has about 28 dB on Gaussian operands
_PACKAGES = ("tensorrt", "polygraphy")
_MIN_FP8_SM = 89
_OPSET, _IR_VERSION = 21, 10


def make_graph(name: str, weight: np.ndarray, bias: np.ndarray, x_absmax: float) -> onnx.ModelProto:
    """Return the ONNX graph of one linear.

    Args:
        name: One of NAMES.
        weight: (N, K).
        bias: (N,).
        x_absmax: Largest absolute value of the activation, for its FP8 scale.
    """
    n, k = weight.shape
    constants = [numpy_helper.from_array(bias.astype(np.float16), "bias")]
    nodes = []
    left, right = "x", "weight"
    transposed = np.ascontiguousarray(weight.T)
    if name == FP8:
        constants += _fp8_constants(transposed, x_absmax)
        nodes += [
            helper.make_node("QuantizeLinear", ["x", "x_scale", "zero"], ["x_fp8"], "quantize"),
            helper.make_node("DequantizeLinear", ["x_fp8", "x_scale"], ["x_real"], "dequantize"),
            helper.make_node("DequantizeLinear", ["weight", "w_scale"], ["w_real"], "weight_real"),
        ]
        left, right = "x_real", "w_real"
    else:
        constants.append(numpy_helper.from_array(transposed.astype(np.float16), "weight"))
    nodes += [
        helper.make_node("MatMul", [left, right], ["product"], "product"),
        helper.make_node("Add", ["product", "bias"], ["y"], "bias"),
    ]
    ends = [
        helper.make_tensor_value_info(end, TensorProto.FLOAT16, ["m", size])
        for end, size in (("x", k), ("y", n))
    ]
    graph = helper.make_graph(nodes, name, ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", _OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return model


def _fp8_constants(weight: np.ndarray, x_absmax: float) -> list[onnx.TensorProto]:
    """Return the weight in E4M3, the scales of both operands and the zero point."""
    x_scale = np.float16(x_absmax / E4M3_MAX)
    w_scale = np.float16(np.abs(weight).max() / E4M3_MAX)
    # The scale was rounded, so the largest value may lie above 448, where E4M3 has NaN.
    scaled = (weight.astype(np.float32) / np.float32(w_scale)).clip(-E4M3_MAX, E4M3_MAX)
    codes = torch.from_numpy(scaled).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    kind = TensorProto.FLOAT8E4M3FN
    return [
        helper.make_tensor("weight", kind, weight.shape, codes.tobytes(), raw=True),
        helper.make_tensor("zero", kind, (), b"\0", raw=True),
        numpy_helper.from_array(np.asarray(x_scale), "x_scale"),
        numpy_helper.from_array(np.asarray(w_scale), "w_scale"),
    ]


def build(
    model: onnx.ModelProto, folder: Path, runtime: RuntimeName, gpu: str
) -> "list[EngineLayer]":
    """Build a graph's engine into a folder; return what the builder says it is made of.

    Raises:
        RunnerError: The builder refuses it.
    """
    from treeq_export.engines.engine import LAYERS_FILE, BuildOrder, build_engine
    from treeq_export.engines.layer_list import parse_layers
    from treeq_export.records.build import ShapeRange

    path = folder / "model.onnx"
    onnx.save(model, str(path))
    k = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    profile = ShapeRange(min=[1, k], opt=[OPT_TOKENS, k], max=[max(TOKENS), k])
    order = BuildOrder(
        runtime=runtime, gpu=gpu, graph=str(path), profile={"x": profile}, folder=str(folder)
    )
    build_engine(order, None, lambda _: None)
    return parse_layers((folder / LAYERS_FILE).read_text())


def why_missing(name: str, gpu: str) -> str | None:
    """Return why a contender cannot run here; None if it can be tried.

    Args:
        name: One of NAMES.
        gpu: Architecture, for example "sm_90"; empty without a GPU.
    """
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            return f"package {package} is not installed"
    if not gpu:
        return "needs a GPU"
    if name == FP8 and int(gpu.removeprefix("sm_")) < _MIN_FP8_SM:
        return f"{gpu} has no FP8 product; sm_{_MIN_FP8_SM} or later has"
    return None


class EngineLinear:
    """A deserialized engine of one linear. Untested: needs a GPU with TensorRT.

    Args:
        folder: Folder in which `build` left the engine.
        n: Output features.
    """

    def __init__(self, folder: Path, n: int) -> None:
        from treeq_export.runners.engine_manifest import ENGINE_FILE

        trt: Any = load_runtime("tensorrt").module
        self._n = n
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine((folder / ENGINE_FILE).read_bytes())
        if self._engine is None:
            raise RunnerError(f"{folder}: TensorRT refuses the engine that it built here.")

    def bind(self, x: Tensor) -> Callable[[], Tensor]:
        """Return a call that enqueues x (M, K) on torch's current stream and returns y (M, N).

        It has a context of its own, which lives as long as the call, so that a CUDA graph of it
        refers to no other number of tokens.
        """
        context: Any = self._engine.create_execution_context()
        y = torch.empty((len(x), self._n), dtype=x.dtype, device=x.device)
        if context is None or not (
            context.set_input_shape("x", tuple(x.shape))
            and context.set_tensor_address("x", x.data_ptr())
            and context.set_tensor_address("y", y.data_ptr())
        ):
            raise RunnerError(f"TensorRT takes no x of shape {tuple(x.shape)}.")

        def call(x: Tensor = x) -> Tensor:  # it keeps x alive
            if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                raise RunnerError(f"TensorRT cannot run x of shape {tuple(x.shape)}.")
            return y

        return call


@dataclass
class Opponents:
    """TensorRT's linears of one shape.

    Attributes:
        linears: By name; what cannot be built is not among them.
        missing: Why, by name.
        layers: Layers of each engine, for example ["FP8 gemm", "Half kgen"].
    """

    linears: dict[str, EngineLinear] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    layers: dict[str, list[str]] = field(default_factory=dict)

    def add_to(
        self, plain: dict[str, Callable[[], Tensor]], missing: dict[str, str], arrays: list[Tensor]
    ) -> None:
        """Add what runs, and is right, on x (M, K), weight (N, K), bias (N,) in fp16."""
        missing |= self.missing
        for name, linear in self.linears.items():
            try:
                call = linear.bind(arrays[0])
                found = sqnr_db(functional.linear(*arrays), call())
            except TreeqError as error:
                missing[name] = str(error)
                continue
            if found >= MIN_SQNR_DB:
                plain[name] = call
            else:
                missing[name] = f"its output is wrong: {found:.1f} dB of cuBLAS fp16"


def sqnr_db(expected: Tensor, y: Tensor) -> float:
    """Return the ratio of signal to error in dB."""
    signal = expected.double()
    error = (signal - y.double()).square().sum()
    return float(10 * torch.log10(signal.square().sum() / error.clamp_min(1e-30)))


def open_opponents(k: int, n: int, device: torch.device) -> Opponents:
    """Build TensorRT's linears of one shape on the machine's GPU; seconds each, or more.

    The activation's FP8 scale is the absmax of the largest number of tokens.
    """
    gpu = ""
    if device.type == "cuda":
        gpu = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    opponents = Opponents()
    for name in NAMES:
        why = why_missing(name, gpu)
        if why is not None:
            opponents.missing[name] = why
            continue
        x, weight, bias = make_float_linear(max(TOKENS), k, n)
        model = make_graph(name, weight.numpy(), bias.numpy(), float(x.abs().max()))
        try:
            with tempfile.TemporaryDirectory(prefix="treeq-tensorrt-") as folder:
                layers = build(model, Path(folder), "tensorrt", gpu)
                opponents.linears[name] = EngineLinear(Path(folder), n)
            opponents.layers[name] = [layer.description for layer in layers]
        except TreeqError as error:
            opponents.missing[name] = " ".join(str(error).split())[:200]
    return opponents
