"""From a loaded model and the recipe to a denoiser, with the prompts that condition it.

The text encoders are no part of this tool. A conditioning file is a safetensors file with one
tensor per text input of the model, named like it, one row per prompt; it decides on the number of
text tokens.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from treeq_export.errors import CheckpointError, RecipeError
from treeq_export.model.checkpoint import Checkpoint
from treeq_export.model.zoo import Denoiser
from treeq_export.reading import load_safetensors
from treeq_export.recipe import ModelSection

_NUM_TEXT_TOKENS = 16  # of random text
_UNSET_TEXT_TOKENS = (None, 16)  # run folders of earlier versions hold 16 where no key was set


def make_denoiser(model: nn.Module, checkpoint: Checkpoint, section: ModelSection) -> Denoiser:
    """Wrap a loaded model.

    Args:
        model: The network that `load_model` returned.
        checkpoint: The checkpoint that it is from.
        section: The recipe's `model` section: latent size, text tokens, conditioning file.

    Returns:
        The denoiser in evaluation mode.

    Raises:
        RecipeError: The latent size is missing or does not fit the patches, or the model takes no
            text and the section has some, or the text is of another length than it says.
        CheckpointError: The conditioning file does not fit, or the output has other channels.
    """
    family, config = checkpoint.family, cast(Any, model).config
    _check_channels(checkpoint, config)
    row_shapes = family.row_shapes_of(config, section.num_text_tokens or _NUM_TEXT_TOKENS)
    prompts = None
    if "encoder_hidden_states" not in row_shapes:
        for key, unset in (("conditioning", (None,)), ("num_text_tokens", _UNSET_TEXT_TOKENS)):
            if getattr(section, key) not in unset:
                raise RecipeError(
                    f"model.{key}: received {getattr(section, key)}, but {checkpoint.class_name} "
                    "takes class labels, no text. Remove the key."
                )
    elif section.conditioning is not None:
        prompts = load_prompts(Path(section.conditioning), row_shapes)
        row_shapes = {name: tuple(rows.shape[1:]) for name, rows in prompts.items()}
        found = row_shapes["encoder_hidden_states"][0]
        if section.num_text_tokens not in (*_UNSET_TEXT_TOKENS, found):
            raise RecipeError(
                f"model.num_text_tokens: received {section.num_text_tokens}, but the prompts of "
                f"model.conditioning have {found}. Remove the key; the file decides."
            )
    sample_shape = family.sample_shape_of(config, section.latent_size)
    return family(model, sample_shape, row_shapes, prompts).eval()


def _check_channels(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    num_in = config["in_channels"]
    num_out = config["out_channels"] or num_in
    allowed = (num_in, 2 * num_in) if checkpoint.family.may_learn_sigma else (num_in,)
    if num_out not in allowed:
        raise CheckpointError(
            f"{checkpoint.path}: received out_channels {num_out} for in_channels {num_in}, "
            f"expected {' or '.join(map(str, allowed))}. Inpainting and control variants are not "
            "supported; use the base model."
        )


def load_prompts(path: Path, row_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read and check a conditioning file.

    Args:
        path: The safetensors file.
        row_shapes: Shape of one row of every text input; the number of tokens may differ.

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
