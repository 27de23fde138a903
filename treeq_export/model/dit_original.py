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
from typing import Any, cast

from torch import Tensor, nn

from treeq_export.errors import CheckpointError

# Heads cannot be read from shapes; these are the published widths (S, B, L, XL).
_NUM_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
_POSITION_TOLERANCE = 1e-3  # rounding the table to half precision moves it by 5e-4
_REQUIRED = {  # name to number of axes
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "y_embedder.embedding_table.weight": 2,
    "t_embedder.mlp.0.weight": 2,
    "final_layer.linear.weight": 2,
    "blocks.0.attn.qkv.weight": 2,
}
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
        tensors: The file's state dict.

    Returns:
        Keyword arguments of DiTTransformer2DModel.

    Raises:
        CheckpointError: Not a DiT, or of a width whose number of heads is unknown.
    """
    for name, num_axes in _REQUIRED.items():
        if name not in tensors or tensors[name].ndim != num_axes:
            received = str(tuple(tensors[name].shape)) if name in tensors else "nothing"
            raise CheckpointError(
                f"{path}: {name}: received {received}, expected a tensor of {num_axes} axes, so "
                "this is no original DiT. For another model, give a diffusers folder with "
                "config.json."
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
    blocks = [match[1] for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))]
    return {
        "num_attention_heads": _NUM_HEADS[hidden],
        "attention_head_dim": hidden // _NUM_HEADS[hidden],
        "in_channels": in_channels,
        "out_channels": tensors["final_layer.linear.weight"].shape[0] // patch**2,
        "num_layers": 1 + max(map(int, blocks)),
        "sample_size": grid * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": tensors["y_embedder.embedding_table.weight"].shape[0] - 1,
        "norm_eps": 1e-6,
    }


def convert_tensors(tensors: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Rename an original state dict to diffusers' names; tensors are views, not copies.

    Args:
        tensors: The original state dict; `pos_embed` is dropped, see `check_positions`.
        num_layers: Number of blocks, which all get the one timestep and label embedder.

    Returns:
        A state dict of DiTTransformer2DModel; unknown names are kept for the caller to refuse.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if name == "pos_embed":
            continue
        if module in _GLOBAL:
            converted[f"{_GLOBAL[module]}.{kind}"] = tensor
        elif module in _SHARED:
            for block in range(num_layers):
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


def check_positions(path: Path, table: Tensor, model: nn.Module) -> None:
    """Refuse a position table that is not the fixed sin-cos one, which diffusers computes.

    Args:
        path: The file, for errors.
        table: The checkpoint's `pos_embed`, (1, tokens, hidden).
        model: The DiTTransformer2DModel built for it.

    Raises:
        CheckpointError: Another shape, or other values.
    """
    computed = dict(model.named_buffers())["pos_embed.pos_embed"]
    if table.shape != computed.shape:
        raise CheckpointError(
            f"{path}: pos_embed: received shape {tuple(table.shape)}, expected "
            f"{tuple(computed.shape)}. Use a checkpoint of the published architecture."
        )
    difference = (table.float() - computed).abs().max().item()
    if not difference < _POSITION_TOLERANCE:  # NaN is refused too
        raise CheckpointError(
            f"{path}: pos_embed: differs from the fixed sin-cos table by {difference:.3g}, "
            f"expected less than {_POSITION_TOLERANCE}. Learned positions are not supported; use "
            "a published checkpoint."
        )


def use_original_timesteps(model: nn.Module) -> None:
    """Give every timestep embedder the original's frequencies, 10000^(-i / 128).

    Args:
        model: A DiTTransformer2DModel with the weights of an original checkpoint; changed in place.
    """
    for name, module in model.named_modules():
        if name.endswith("norm1.emb.time_proj"):
            cast(Any, module).downscale_freq_shift = 0
