"""Checkpoints of facebookresearch/DiT, expressed as diffusers' DiTTransformer2DModel.

Source: Peebles & Xie, Scalable Diffusion Models with Transformers, 2023 (arXiv:2212.09748).

    x_embedder.proj                  pos_embed.proj
    pos_embed                        computed; checked to be the same sin-cos table
    t_embedder.mlp.{0,2}             every block's norm1.emb.timestep_embedder.linear_{1,2}
    y_embedder.embedding_table       every block's norm1.emb.class_embedder.embedding_table
    blocks.N.adaLN_modulation.1      transformer_blocks.N.norm1.linear
    blocks.N.attn.qkv                transformer_blocks.N.attn1.to_{q,k,v}, rows in this order
    blocks.N.attn.proj               transformer_blocks.N.attn1.to_out.0
    blocks.N.mlp.fc{1,2}             transformer_blocks.N.ff.net.{0.proj,2}
    final_layer.adaLN_modulation.1   proj_out_1
    final_layer.linear               proj_out_2

Both chunk the modulation as shift, scale, gate, so rows keep their order. Two settings differ: the
original's LayerNorms have eps 1e-6, and its timestep frequencies are 10000^(-i / 128), where
diffusers' DiT spaces them as 10000^(-i / 127); `use_original_timesteps` restores the former.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from treeq_export.errors import CheckpointError

# Heads cannot be read from shapes; these are the published widths (S, B, L, XL).
_NUM_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
_REQUIRED = (
    "x_embedder.proj.weight",
    "pos_embed",
    "y_embedder.embedding_table.weight",
    "t_embedder.mlp.0.weight",
    "final_layer.linear.weight",
    "blocks.0.attn.qkv.weight",
)
_GLOBAL = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_SHARED = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}


def make_config(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Deduce the diffusers configuration from the shapes of an original checkpoint.

    Args:
        path: The file, for errors.
        tensors: Its state dict.

    Returns:
        Keyword arguments of DiTTransformer2DModel.

    Raises:
        CheckpointError: Not a DiT, or of a width whose number of heads is unknown.
    """
    for name in _REQUIRED:
        if name not in tensors:
            raise CheckpointError(
                f"{path}: {name}: missing, so this is no original DiT. For another model, give a "
                "diffusers folder with config.json."
            )
    hidden, in_channels, patch = tensors["x_embedder.proj.weight"].shape[:3]
    if hidden not in _NUM_HEADS:
        raise CheckpointError(
            f"{path}: x_embedder.proj.weight: received hidden size {hidden}, expected one of "
            f"{', '.join(map(str, _NUM_HEADS))}, whose number of heads is known. "
            "Convert the model to a diffusers folder, where config.json states it."
        )
    num_tokens = tensors["pos_embed"].shape[-2]
    grid = math.isqrt(num_tokens)
    if grid * grid != num_tokens:
        raise CheckpointError(
            f"{path}: pos_embed: received {num_tokens} positions, expected a square number. "
            "Only square images are supported."
        )
    depth = 1 + max(int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)", name)))
    return {
        "num_attention_heads": _NUM_HEADS[hidden],
        "attention_head_dim": hidden // _NUM_HEADS[hidden],
        "in_channels": in_channels,
        "out_channels": tensors["final_layer.linear.weight"].shape[0] // patch**2,
        "num_layers": depth,
        "sample_size": grid * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": tensors["y_embedder.embedding_table.weight"].shape[0] - 1,
        "norm_eps": 1e-6,
    }


def convert_tensors(
    path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename an original state dict to diffusers' names; tensors are views, not copies.

    Args:
        path: The file, for errors.
        tensors: The original state dict.
        config: What `make_config` deduced from it.

    Returns:
        A state dict of DiTTransformer2DModel; unknown names are kept for the caller to refuse.

    Raises:
        CheckpointError: The position table is not the fixed sin-cos one.
    """
    _check_positions(path, tensors["pos_embed"], config)
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if name == "pos_embed":
            continue
        if module in _GLOBAL:
            converted[f"{_GLOBAL[module]}.{kind}"] = tensor
        elif module in _SHARED:
            for block in range(config["num_layers"]):
                target = f"transformer_blocks.{block}.norm1.emb.{_SHARED[module]}.{kind}"
                converted[target] = tensor
        else:
            converted |= _convert_block_tensor(name, tensor)
    return converted


def _convert_block_tensor(name: str, tensor: Tensor) -> dict[str, Tensor]:
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        return {name: tensor}
    block, module, kind = match.groups()
    prefix = f"transformer_blocks.{block}"
    if module == "attn.qkv":
        return {
            f"{prefix}.attn1.to_{letter}.{kind}": part
            for letter, part in zip("qkv", tensor.chunk(3), strict=True)
        }
    if module in _BLOCK:
        return {f"{prefix}.{_BLOCK[module]}.{kind}": tensor}
    return {name: tensor}


def make_positions(grid: int, hidden: int) -> Tensor:
    """Return the 2-D sin-cos table of the DiT paper.

    Half of the channels encode the column, half the row, each as sines, then cosines, of
    position * 10000^(-i / (hidden / 4)).

    Args:
        grid: Patches along one side.
        hidden: Channels, divisible by 4.

    Returns:
        (1, grid * grid, hidden) float32, rows in raster order.
    """
    frequency = 10000.0 ** -(torch.arange(hidden // 4, dtype=torch.float64) / (hidden / 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    column = line[None].expand(grid, -1, -1)
    row = line[:, None].expand(-1, grid, -1)
    return torch.cat([column, row], dim=2).reshape(1, grid * grid, hidden).float()


def _check_positions(path: Path, table: Tensor, config: Mapping[str, Any]) -> None:
    hidden = config["num_attention_heads"] * config["attention_head_dim"]
    expected = make_positions(config["sample_size"] // config["patch_size"], hidden)
    if table.shape != expected.shape:
        raise CheckpointError(
            f"{path}: pos_embed: received shape {tuple(table.shape)}, expected "
            f"{tuple(expected.shape)}. Use a checkpoint of the published architecture."
        )
    difference = (table.float() - expected).abs().max().item()
    if not difference < 1e-3:  # a half-precision table differs by 5e-4; NaN is refused too
        raise CheckpointError(
            f"{path}: pos_embed: differs from the fixed sin-cos table by {difference:.3g}, expected "
            "less than 0.001. Learned positions are not supported; use a published checkpoint."
        )


def use_original_timesteps(model: nn.Module) -> None:
    """Give every timestep embedder the original's frequencies, 10000^(-i / 128).

    Args:
        model: A DiTTransformer2DModel with the weights of an original checkpoint; changed in place.
    """
    for name, module in model.named_modules():
        if name.endswith("norm1.emb.time_proj"):
            module.downscale_freq_shift = 0
