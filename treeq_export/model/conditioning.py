"""Text conditioning: the shape of every text input, and the file that holds embedded prompts.

The text encoders are no part of this tool. A conditioning file is a safetensors file with one
tensor per text input of the model, named like it, one row per prompt; it decides on the number of
text tokens.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treeq_export.errors import CheckpointError
from treeq_export.reading import load_safetensors


def text_shapes(
    class_name: str, config: Mapping[str, Any], num_text_tokens: int
) -> dict[str, tuple[int, ...]]:
    """Return the shape of one row of every text input, in call order.

    Args:
        class_name: PixArt, SD3 or Flux.
        config: Its diffusers configuration with all defaults.
        num_text_tokens: Length of the text.

    Returns:
        Input name to shape without the batch axis.
    """
    if class_name == "PixArtTransformer2DModel":
        width = config["caption_channels"] or config["cross_attention_dim"]
        return {
            "encoder_hidden_states": (num_text_tokens, width),
            "encoder_attention_mask": (num_text_tokens,),
        }
    return {
        "encoder_hidden_states": (num_text_tokens, config["joint_attention_dim"]),
        "pooled_projections": (config["pooled_projection_dim"],),
    }


def load_prompts(path: Path, row_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read and check a conditioning file.

    Args:
        path: The safetensors file.
        row_shapes: What `text_shapes` returned; the number of tokens may differ.

    Returns:
        Input name to (prompts, *row shape) float32, in call order.

    Raises:
        CheckpointError: Unreadable, other names or shapes, or not finite.
    """
    tensors = load_safetensors(
        path,
        error=CheckpointError,
        remedy=f"Set model.conditioning to a safetensors file with {', '.join(row_shapes)}, or "
        "leave it out for random conditioning.",
        framework="pt",
    )
    if set(tensors) != set(row_shapes):
        raise CheckpointError(
            f"{path}: received tensors {', '.join(sorted(tensors)) or 'none'}, expected "
            f"{', '.join(row_shapes)}. Name them like the model's inputs."
        )
    states = tensors["encoder_hidden_states"]
    num_prompts = len(states) if states.ndim else 0
    num_tokens = states.shape[1] if states.ndim == 3 else None
    for name, shape in row_shapes.items():
        rows = tensors[name]
        wanted = shape
        if num_tokens and name.startswith("encoder_"):
            wanted = (num_tokens, *shape[1:])  # the file decides on the number of tokens
        if num_prompts == 0 or tuple(rows.shape) != (num_prompts, *wanted):
            axes = ", ".join(map(str, (num_prompts or "prompts", *wanted)))
            raise CheckpointError(
                f"{path}: {name}: received shape {tuple(rows.shape)}, expected ({axes}). "
                "Save one row per prompt, the same number of prompts for every tensor."
            )
        if not rows.to(torch.float32).isfinite().all():
            raise CheckpointError(
                f"{path}: {name}: holds NaN or infinity. Encode the prompts again."
            )
    return {name: tensors[name].to(torch.float32).contiguous() for name in row_shapes}
