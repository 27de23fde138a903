"""What is timed and checked on a GPU: the linears of DiT-XL/2, formats, numbers of tokens."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from treeq_gpu import launch

from treeq_export.ops import ActScale, LayerFormat
from treeq_export.quant.grids import INTEGER
from treeq_export.quant.numerics import activation_step
from treeq_export.quant.packing import pack
from treeq_export.quant.spec import ActivationFormat

# K, N by name: q, k or v alone, all three as one, the other linears of a block, and adaLN.
SHAPES = {
    "q": (1152, 1152),
    "qkv": (1152, 3456),
    "fc1": (1152, 4608),
    "fc2": (4608, 1152),
    "adaln": (1152, 6912),
}
# proj has the shape of q.
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# Borders of tiles and shape classes, and what fits none, beside TOKENS.
CHECKED_TOKENS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 257, 511, 512, 1000)
CHECKED_TOKENS += (1023, 1024, 1025, 2047, 2048, 4095, 4096)
ROTATION_GROUP = 128
SMOKE_SHAPES = {"q": (128, 96), "fc2": (256, 64)}
SMOKE_TOKENS = (1, 17)


@dataclass(frozen=True)
class Format:
    """Bits of weight and activation.

    Attributes:
        name: The format's name, for example "w3a3".
        weight_bits: Bits of a weight, 2..8.
        act_bits: Bits of an activation, 2..8.
        act_scale: Kind of the activation's scale.
        rank: Rank of a low-rank branch; 0 is none.
    """

    name: str
    weight_bits: int
    act_bits: int
    act_scale: ActScale = ActScale.TOKEN_RMS
    rank: int = 0

    @property
    def activation(self) -> ActivationFormat:
        """The activation's format."""
        return ActivationFormat(bits=self.act_bits, scale=self.act_scale)

    @property
    def step(self) -> float:
        """The activation's step."""
        step = activation_step(self.activation)
        assert step is not None
        return step

    def layer(self, k: int, n: int) -> LayerFormat:
        """Return a linear of this format, (N, K), with a scale per channel."""
        sizes = (ROTATION_GROUP, 0, k, n)
        return LayerFormat(self.weight_bits, self.act_bits, self.act_scale, self.step, *sizes)


FORMATS = (
    Format("w2a4", 2, 4),
    Format("w3a3", 3, 3),
    Format("w4a4", 4, 4),
    Format("w8a8", 8, 8, ActScale.TOKEN_ABSMAX),
)


@dataclass
class Layer:
    """One quantized linear with random codes on a device.

    Attributes:
        format: Bits of weight and activation.
        k: Input features.
        n: Output features.
        codes: Weight codes (N, K) int8 on the CPU, for the reference.
        planes: (bits, N, K/32) int32.
        weight_scale: (N, 1) float32, such that outputs have the size of inputs.
        bias: (N,) float32.
    """

    format: Format
    k: int
    n: int
    codes: np.ndarray
    planes: Tensor
    weight_scale: Tensor
    bias: Tensor
    layer: LayerFormat = field(init=False)
    unit_scale: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.layer = self.format.layer(self.k, self.n)
        self.unit_scale = torch.ones_like(self.weight_scale)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and scales of x (M, K)."""
        return launch.quantize_tokens(x, self.layer)

    def product(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Return y (M, N) of quantized tokens."""
        return launch.product(
            codes,
            scale,
            self.planes,
            self.weight_scale,
            self.bias,
            None,
            self.layer,
            dtype,
        )

    def run(self, x: Tensor) -> Tensor:
        """Return y (M, N) of x, quantize pass included."""
        return self.product(*self.quantize(x), x.dtype)

    def product_of_sums(self, codes: Tensor) -> Tensor:
        """Return the integer sums as float32, by the kernels that `product` would launch."""
        ones = torch.ones(len(codes), dtype=torch.float32, device=codes.device)
        return launch.product(
            codes,
            ones,
            self.planes,
            self.unit_scale,
            None,
            None,
            self.layer,
            torch.float32,
        )


def make_layer(fmt: Format, k: int, n: int, device: torch.device, seed: int) -> Layer:
    """Return a layer of random codes."""
    rng = np.random.default_rng(seed)
    low, high = INTEGER.ends(fmt.weight_bits)
    codes = rng.integers(low, high + 1, (n, k)).astype(np.int8)
    scale = 1.0 / (np.sqrt(k) * float(codes.std()))
    return Layer(
        fmt,
        k,
        n,
        codes,
        torch.from_numpy(pack(codes, fmt.weight_bits)).to(device),
        torch.full((n, 1), scale, dtype=torch.float32, device=device),
        torch.from_numpy(rng.standard_normal(n).astype(np.float32)).to(device),
    )


def make_float_linear(m: int, k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (M, K), weight (N, K), the same for every M, and bias (N,) in fp32 on the CPU."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn((n, k), generator=generator) / k**0.5
    bias = torch.randn(n, generator=generator)
    return torch.randn((m, k), generator=generator), weight, bias


def make_tokens(m: int, k: int, device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    """Return Gaussian tokens (M, K), a zero one and one with an outlier among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((m, k), generator=generator)
    if m > 2:
        x[1] = 0
        x[2, 5] = 40
    return x.to(device, dtype)
