"""Fixtures that several test files share: tiny checkpoints of all families, the digits sample."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from treeq_export.model.checkpoint import load_model, open_checkpoint
from treeq_export.model.zoo import Denoiser, make_denoiser
from treeq_export.recipe import ModelSection

TINY_LATENT = 8
# All in_features of the blocks' linears are multiples of 64.
TINY_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "dit": (
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "sample_size": TINY_LATENT,
            "num_embeds_ada_norm": 10,
        },
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 3,
            "attention_head_dim": 64,
            "cross_attention_dim": 192,
            "caption_channels": 32,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "sample_size": TINY_LATENT,
            "use_additional_conditions": True,
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "sample_size": TINY_LATENT,
            "pos_embed_max_size": 6,
            "joint_attention_dim": 32,
            "caption_projection_dim": 64,
            "pooled_projection_dim": 48,
        },
    ),
    "flux": (
        "FluxTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "axes_dims_rope": [8, 12, 12],
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 48,
            "guidance_embeds": True,
        },
    ),
}


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the random-weight checkpoints "dit", "pixart", "sd3" and "flux".

    Read-only: a test that changes a checkpoint copies it first.
    """
    import diffusers

    folder = tmp_path_factory.mktemp("tiny")
    for name, (class_name, config) in TINY_CONFIGS.items():
        torch.manual_seed(0)
        model = getattr(diffusers, class_name)(**config)
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def make_tiny_denoiser(tiny_checkpoints: Path) -> Callable[..., Denoiser]:
    """A function: family name, fields of the recipe's model section -> a new tiny denoiser."""

    def make(name: str, **section: Any) -> Denoiser:
        checkpoint = open_checkpoint(tiny_checkpoints / name)
        fields = {"checkpoint": str(checkpoint.path), "latent_size": TINY_LATENT} | section
        return make_denoiser(load_model(checkpoint), checkpoint, ModelSection(**fields))

    return make


@pytest.fixture(scope="session")
def digits_folder() -> Path:
    """The shipped sample: checkpoint/, classifier.onnx, reference.safetensors."""
    return Path(__file__).parents[1] / "samples" / "digits"


@pytest.fixture(scope="session")
def digits_checkpoint(digits_folder: Path) -> Path:
    """The folder of the trained digits checkpoint."""
    return digits_folder / "checkpoint"
