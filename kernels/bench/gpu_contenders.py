"""Who is timed on a GPU: our kernels, and what an engineer would use instead, on one linear.

    <format>            quantize pass, product, bias: what replaces a linear layer
    <format>_product    the product alone, on codes that are at hand
    quantize_<scale>    the quantize pass alone
    fp16, bf16          torch.nn.functional.linear with bias (cuBLAS)
    int_mm              torch._int_mm on int8 codes: cuBLAS' integer product, without scales
    tensorrt_fp16, tensorrt_fp8     TensorRT's linear, where it is installed (gpu_tensorrt.py)

Each is captured in a CUDA graph, so that the host's launches are not in its time. What cannot run
is left out, and `missing` says why.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from gpu_cases import FORMATS, Layer, make_float_linear, make_layer, make_tokens
from gpu_tensorrt import NAMES, Opponents
from torch import Tensor
from torch.nn import functional

from treeq_export.errors import RunnerError
from treeq_export.runners.cuda_runner import capture_graph

Call = Callable[[], object]
BASELINES = ("bf16", "fp16", "int_mm")
_MIN_INT_MM_TOKENS = 17  # torch._int_mm wants more than 16 rows


def make_layers(k: int, n: int, device: torch.device) -> list[Layer]:
    """Return one layer of each format."""
    return [make_layer(fmt, k, n, device, seed=1) for fmt in FORMATS]


@contextmanager
def open_contenders(
    layers: list[Layer], m: int, device: torch.device, dtype: torch.dtype, opponents: Opponents
) -> Iterator[tuple[dict[str, Call], dict[str, str]]]:
    """Yield every contender by name, and why others are missing.

    Args:
        layers: From `make_layers`, of one shape.
        m: Tokens.
        device: Device; on the CPU the contenders are called plainly, in Triton's interpreter.
        dtype: Type of x and y of our layers.
        opponents: TensorRT's linears of the same shape.
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
    missing = _add_baselines(plain, m, k, n, device, opponents)
    calls: dict[str, Call] = dict(plain)
    if device.type == "cuda":
        calls = capture_all(plain, missing)
    try:
        yield calls, missing
    finally:
        calls.clear()
        plain.clear()


def capture_all(plain: dict[str, Callable[[], Tensor]], missing: dict[str, str]) -> dict[str, Call]:
    """Return replays by name; of TensorRT's, one that cannot be captured goes to `missing`."""
    calls: dict[str, Call] = {}
    for name, call in plain.items():
        try:
            calls[name] = capture_graph(call)
        except (RuntimeError, RunnerError) as error:
            if name not in NAMES:
                raise
            missing[name] = f"cannot be captured: {' '.join(str(error).split())[:160]}"
    return calls


def _add_baselines(
    plain: dict[str, Callable[[], Tensor]],
    m: int,
    k: int,
    n: int,
    device: torch.device,
    opponents: Opponents,
) -> dict[str, str]:
    linear = make_float_linear(m, k, n)
    arrays: list[Tensor] = []
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        arrays = [tensor.to(device, dtype) for tensor in linear]
        plain[name] = lambda arrays=arrays: functional.linear(*arrays)
    missing: dict[str, str] = {}
    opponents.add_to(plain, missing, arrays)  # in fp16
    generator = torch.Generator().manual_seed(4)
    if m >= _MIN_INT_MM_TOKENS:
        codes = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8).to(device)
        square = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8).to(device)
        multiply = torch.ops.aten._int_mm.default  # torch._int_mm
        plain["int_mm"] = lambda: multiply(codes, square.T)
    else:
        missing["int_mm"] = f"torch._int_mm takes {_MIN_INT_MM_TOKENS} rows or more"
    return missing
