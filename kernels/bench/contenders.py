"""Who is timed: our kernels, and what an engineer would use instead, on one linear layer each.

Every contender is a function x (M, K) float32 -> y (M, N), on one thread.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from treeq_export.ops import ActScale, LayerFormat
from treeq_export.quant.grids import INTEGER
from treeq_export.quant.numerics import activation_step
from treeq_export.quant.packing import pack
from treeq_export.quant.spec import ActivationFormat
from treeq_export.runners.cpu_kernels import CpuQLinear

Array = NDArray[Any]
Call = Callable[[Array], Array]
WIDTHS = (2, 3, 4, 8)
NBITS_BLOCK = 128
ROTATION_GROUP = 128


@contextmanager
def open_contenders(k: int, n: int, seed: int) -> Iterator[dict[str, Call]]:
    """Yield every contender by name.

    Args:
        k: Input features.
        n: Output features.
        seed: Seed of the weights.
    """
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((n, k)) / np.sqrt(k)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    with ExitStack() as stack:
        calls: dict[str, Call] = {}
        for bits in WIDTHS:
            layer = stack.enter_context(_make_treeq(k, n, bits, bias, rng))
            calls[f"treeq_w{bits}a{bits}"] = layer.run
        calls["ort_fp32"] = _run_onnx(_fp32_model(weight, bias))
        calls["ort_int8_static"] = _run_onnx(_int8_model(weight, bias))
        calls["ort_int8_dynamic"] = _run_onnx(_int8_dynamic_model(weight, bias))
        calls["ort_matmulnbits4"] = _run_onnx(_nbits_model(weight, bias))
        linear = torch.nn.Linear(k, n)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(weight))
            linear.bias.copy_(torch.from_numpy(bias))
        calls["torch_fp32"] = _run_torch(linear)
        calls["torch_int8_dynamic"] = _run_torch(_torch_dynamic(linear))
        yield calls


def _make_treeq(k: int, n: int, bits: int, bias: Array, rng: np.random.Generator) -> CpuQLinear:
    low, high = INTEGER.ends(bits)
    codes = rng.integers(low, high + 1, (n, k)).astype(np.int8)
    activation = ActivationFormat(bits=bits, scale=ActScale.for_bits(bits))
    step = activation_step(activation) or 0.0
    layer = LayerFormat(bits, bits, activation.scale, step, ROTATION_GROUP, 0, k, n)
    return CpuQLinear(layer, pack(codes, bits), np.full((n, 1), 0.01, np.float32), bias=bias)


def _model(nodes: list[Any], k: int, n: int, arrays: dict[str, Array], *domains: str) -> bytes:
    graph = helper.make_graph(
        nodes,
        "linear",
        # Rank 3: with rank 2 ONNX Runtime makes a float Gemm of the quantized form.
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "m", n])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 21), *(helper.make_opsetid(name, 1) for name in domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return model.SerializeToString()


def _run_onnx(model: bytes) -> Call:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda x: np.asarray(session.run(None, {"x": x[None]})[0])[0]


def _run_torch(module: torch.nn.Module) -> Call:
    def run(x: Array) -> Array:
        with torch.inference_mode():
            return module(torch.from_numpy(x)).numpy()

    return run


def _torch_dynamic(linear: torch.nn.Linear) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torchao, still the built-in one
        return torch.ao.quantization.quantize_dynamic(
            torch.nn.Sequential(linear), {torch.nn.Linear}, dtype=torch.qint8
        )


def _fp32_model(weight: Array, bias: Array) -> bytes:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["y"]),
    ]
    return _model(nodes, weight.shape[1], len(weight), {"w": weight.T.copy(), "b": bias})


def _quantize_int8(weight: Array) -> tuple[Array, Array]:
    scale = (np.abs(weight).max(axis=1) / 127).astype(np.float32)
    codes = np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8)
    return codes.T.copy(), scale


def _int8_model(weight: Array, bias: Array) -> bytes:
    """Static per-tensor activations, per-channel weights: MatMulIntegerToFloat."""
    codes, scale = _quantize_int8(weight)
    arrays = {
        "w": codes,
        "w_scale": scale,
        "x_scale": np.float32(4 / 127),
        "x_zero": np.int8(0),
        "b": bias,
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "x_scale", "x_zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale"], ["wd"], axis=1),
        helper.make_node("MatMul", ["xd", "wd"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["y"]),
    ]
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    return _model(nodes, weight.shape[1], len(weight), arrays)


def _int8_dynamic_model(weight: Array, bias: Array) -> bytes:
    """One scale a tensor, found at each call: DynamicQuantizeMatMul."""
    codes, scale = _quantize_int8(weight)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "x_scale", "x_zero"]),
        helper.make_node("DequantizeLinear", ["q", "x_scale", "x_zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale"], ["wd"], axis=1),
        helper.make_node("MatMul", ["xd", "wd"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["y"]),
    ]
    arrays = {"w": codes, "w_scale": scale, "b": bias}
    return _model(nodes, weight.shape[1], len(weight), arrays)


def _nbits_model(weight: Array, bias: Array) -> bytes:
    """Weight-only 4 bits in blocks of 128, INT8 inside (accuracy_level 4): its fastest form."""
    n, k = weight.shape
    blocks = weight.reshape(n, k // NBITS_BLOCK, NBITS_BLOCK)
    scale = (np.abs(blocks).max(axis=2) / 7).astype(np.float32)
    codes = (np.clip(np.rint(blocks / scale[:, :, None]), -8, 7) + 8).astype(np.uint8)
    packed = codes[:, :, 0::2] | (codes[:, :, 1::2] << 4)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s", "", "", "b"],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=4,
        block_size=NBITS_BLOCK,
        accuracy_level=4,
    )
    arrays = {"w": packed, "s": scale.reshape(-1), "b": bias}
    return _model([node], k, n, arrays, "com.microsoft")


def versions() -> dict[str, str]:
    """Return the versions of the contenders."""
    return {
        "onnxruntime": onnxruntime.__version__,
        "onnx": onnx.__version__,
        "torch": torch.__version__,
    }
