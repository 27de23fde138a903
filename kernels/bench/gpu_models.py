"""A DiT of random weights on a GPU, in floating point and in our kernels, for timing.

Codes are random, which costs what real codes cost; scales are such that activations keep their
size. Nothing about quality can be read from it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from gpu_cases import ROTATION_GROUP, Format
from torch import Tensor, nn

from treeq_export.model.families.dit import LABELS, DiTDenoiser
from treeq_export.model.quantized import put_module
from treeq_export.plan import LayerPlan, TreePath
from treeq_export.quant.grids import INTEGER
from treeq_export.quant.spec import BranchFormat, WeightFormat
from treeq_export.runners.gpu_layers import GpuQLinear, SharedCodes

DIT_XL_2: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
    "num_embeds_ada_norm": 1000,
}
SMOKE: dict[str, Any] = DIT_XL_2 | {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "num_layers": 1,
    "sample_size": 4,
    "num_embeds_ada_norm": 10,
}


FORMATS = (Format("w3a3", 3, 3), Format("w3a3_r16", 3, 3, rank=16), Format("w4a4", 4, 4))


def make_model(
    config: dict[str, Any], device: torch.device, dtype: torch.dtype, seed: int = 0
) -> DiTDenoiser:
    """Return a DiT of random weights in a type, on a device."""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    torch.manual_seed(seed)
    with torch.device(device):
        model = DiTTransformer2DModel(**config)
    size = config["sample_size"]
    denoiser = DiTDenoiser(model, (config["in_channels"], size, size), LABELS)
    for parameter in denoiser.parameters():
        parameter.requires_grad_(False)
    return denoiser.to(device=device, dtype=dtype).eval()


def block_linears(denoiser: DiTDenoiser) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linears of the blocks that a plan quantizes, adaLN's among them, by name."""
    for name, module in list(denoiser.model.named_modules()):
        if isinstance(module, nn.Linear) and "blocks." in name and "emb" not in name:
            yield name, module


def quantize_randomly(denoiser: DiTDenoiser, fmt: Format, seed: int = 0) -> DiTDenoiser:
    """Put layers of random codes into a model, and return it."""
    shared = SharedCodes()
    first = next(denoiser.parameters())
    generator = torch.Generator(first.device).manual_seed(seed)
    for name, linear in block_linears(denoiser):
        layer = random_layer(name, linear, fmt, shared, generator)
        put_module(denoiser, name, layer.place(first.device, first.dtype))
    return denoiser


def random_layer(
    name: str,
    linear: nn.Linear,
    fmt: Format,
    shared: SharedCodes,
    generator: torch.Generator,
) -> GpuQLinear:
    """Return a layer of a linear's shape with random codes."""
    n, k = linear.weight.shape
    device = linear.weight.device
    branch = BranchFormat(b_in=1, b_out=1, rank=fmt.rank) if fmt.rank else None
    plan = LayerPlan(
        name=name,
        in_features=k,
        out_features=n,
        tree=TreePath(block=0, position=name, leaf=0),
        weight=WeightFormat(bits=fmt.weight_bits),
        activation=fmt.activation,
        rotation_group=ROTATION_GROUP,
        branch=branch,
    )
    low, high = -(1 << 31), (1 << 31) - 1
    words = -(-k // 32)
    spread = (INTEGER.ends(fmt.weight_bits)[1] + 1) / 3**0.5  # of uniform codes
    tensors: dict[str, Tensor | None] = {
        "planes": torch.randint(
            low,
            high,
            (fmt.weight_bits, n, words),
            dtype=torch.int32,
            device=device,
            generator=generator,
        ),
        "weight_scale": torch.full((n, 1), 1 / (spread * k**0.5), device=device),
        "bias": None if linear.bias is None else linear.bias.float(),
    }
    if fmt.rank:
        shapes = {"R": (1, k, fmt.rank), "L": (1, fmt.rank, n)}
        for factor, shape in shapes.items():
            scale = 0.1 / shape[1] ** 0.5
            tensors[factor] = scale * torch.randn(shape, device=device, generator=generator)
    return GpuQLinear(plan, tensors, fmt.step, shared)


def weight_bytes(denoiser: nn.Module) -> int:
    """Return the bytes of all parameters and buffers."""
    tensors = (*denoiser.parameters(), *denoiser.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
