"""Who is timed on a GPU: our kernels, and what an engineer would use instead, on one linear.

    <format>            quantize pass, product, bias: what replaces a linear layer
    <format>_product    the product alone, on codes that are at hand
    quantize_<scale>    the quantize pass alone
    fp16, bf16          torch.nn.functional.linear with bias (cuBLAS)
    int_mm              torch._int_mm on int8 codes: cuBLAS' integer product, without scales
    tensorrt_fp16/_fp8  where TensorRT is installed

Each is captured in a CUDA graph, so that the host's launches are not in its time. What cannot run
is left out, and `missing` says why.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from gpu_cases import FORMATS, Layer, make_layer, make_tokens
from torch import Tensor
from torch.nn import functional

from treeq_export.runners.cuda_runner import capture_graph

Call = Callable[[], object]
BASELINES = ("bf16", "fp16", "int_mm")
_MIN_INT_MM_TOKENS = 17  # torch._int_mm wants more than 16 rows


def make_layers(k: int, n: int, device: torch.device) -> list[Layer]:
    """Return one layer of each format."""
    return [make_layer(fmt, k, n, device, seed=1) for fmt in FORMATS]


@contextmanager
def open_contenders(
    layers: list[Layer], m: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[dict[str, Call], dict[str, str]]]:
    """Yield every contender by name, and why others are missing.

    Args:
        layers: From `make_layers`, of one shape.
        m: Tokens.
        device: Where they run; on the CPU they are called plainly, in Triton's interpreter.
        dtype: Type of x and y of our layers.
    """
    k, n = layers[0].k, layers[0].n
    x = make_tokens(m, k, device, dtype, seed=2)
    plain: dict[str, Callable[[], Tensor]] = {}
    for layer in layers:
        name = layer.format.name
        codes, scale = layer.quantize(x)
        plain[name] = lambda layer=layer: layer.run(x)
        plain[f"{name}_product"] = lambda layer=layer, c=codes, s=scale: layer.product(c, s, dtype)
        plain[f"quantize_{layer.format.act_scale}"] = lambda layer=layer: layer.quantize(x)[0]
    missing = _add_baselines(plain, m, k, n, device)
    calls: dict[str, Call] = {}
    for name, call in plain.items():
        calls[name] = capture_graph(call) if device.type == "cuda" else call
    try:
        yield calls, missing
    finally:
        calls.clear()
        plain.clear()


def _add_baselines(
    plain: dict[str, Callable[[], Tensor]], m: int, k: int, n: int, device: torch.device
) -> dict[str, str]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn((n, k), generator=generator) / k**0.5
    bias = torch.randn(n, generator=generator)
    tokens = torch.randn((m, k), generator=generator)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        arrays = [tensor.to(device, dtype) for tensor in (tokens, weight, bias)]
        plain[name] = lambda arrays=arrays: functional.linear(*arrays)
    missing = {}
    if m >= _MIN_INT_MM_TOKENS:
        codes = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8).to(device)
        square = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8).to(device)
        multiply = torch.ops.aten._int_mm.default  # torch._int_mm
        plain["int_mm"] = lambda: multiply(codes, square.T)
    else:
        missing["int_mm"] = f"torch._int_mm takes {_MIN_INT_MM_TOKENS} rows or more"
    if importlib.util.find_spec("tensorrt") is None:
        missing["tensorrt"] = "package tensorrt is not installed"
    else:
        missing["tensorrt"] = "not implemented: needs a GPU with TensorRT to be written against"
    return missing
