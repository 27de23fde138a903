"""Tiny models of all families with random weights: checkpoints, calibrated runs, compiled ones."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from tests.export_cache import export_once
from treeq_export import api
from treeq_export.compile.stage import run_compile
from treeq_export.model.checkpoint import Checkpoint, load_model, open_checkpoint
from treeq_export.model.conditioning import make_denoiser
from treeq_export.model.quantized import quantize_model
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import Plan, Tensors
from treeq_export.recipe import ModelSection, Recipe
from treeq_export.records import CompileRecord

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


def save_tiny(name: str, folder: Path, **changes: Any) -> None:
    """Write a family's checkpoint with random weights; `changes` are to its configuration."""
    import diffusers

    class_name, config = TINY_CONFIGS[name]
    torch.manual_seed(0)
    model = getattr(diffusers, class_name)(**config | changes)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the random-weight checkpoints "dit", "pixart", "sd3" and "flux".

    Read-only: a test that changes a checkpoint copies it first.
    """
    folder = tmp_path_factory.mktemp("tiny")
    for name in TINY_CONFIGS:
        save_tiny(name, folder / name)
    return folder


@pytest.fixture(scope="session")
def make_tiny_denoiser(tiny_checkpoints: Path) -> Callable[..., Denoiser]:
    """A function: family name, fields of the recipe's model section -> a new tiny denoiser."""

    def make(name: str, **section: Any) -> Denoiser:
        checkpoint = open_checkpoint(tiny_checkpoints / name)
        fields = {"checkpoint": str(checkpoint.path), "latent_size": TINY_LATENT} | section
        return make_denoiser(load_model(checkpoint), checkpoint, ModelSection(**fields))

    return make


@dataclass(frozen=True)
class TinyRun:
    """A run folder of a tiny model, searched and calibrated. Read-only: copy it to change it."""

    run: Path
    checkpoint: Checkpoint
    denoiser: Denoiser
    recipe: Recipe
    plan: Plan
    tensors: Tensors

    def compile(self) -> CompileRecord:
        """Run the compile stage."""
        return run_compile(
            self.run, self.denoiser, self.plan, self.tensors, self.recipe.compile, lambda _: None
        )

    def quantized(self) -> Denoiser:
        """Return the quantized model."""
        return quantize_model(self.denoiser, self.plan, self.tensors)

    def export(self) -> ir.Model:
        """Return the exported quantized model, before any pass."""
        return export_once(self.quantized(), self.recipe.compile.max_batch)


@pytest.fixture(scope="session")
def make_tiny_recipe(tiny_checkpoints: Path) -> Callable[..., Recipe]:
    """A function: family name, fields of the search section -> a quick recipe, W4A4, rank 4."""

    def make(family: str, **search: Any) -> Recipe:
        return Recipe.model_validate(
            {
                "name": f"tiny-{family}",
                "model": {
                    "checkpoint": str(tiny_checkpoints / family),
                    "latent_size": TINY_LATENT,
                },
                "sampler": {"steps": 2, "batch_size": 2},
                "search": {
                    "rotation_group": 32,
                    "branch": {"b_in": 1, "b_out": 1, "rank": 4},
                    **search,
                },
                "calibrate": {
                    "num_samples": 3,
                    "num_clip_steps": 8,
                    "max_tokens": 128,
                    "inputs": "full_precision",
                    "bias_correction": False,
                    "rounding": "nearest",
                },
            }
        )

    return make


@pytest.fixture(scope="session")
def make_tiny_run(
    make_tiny_recipe: Callable[..., Recipe],
    make_tiny_denoiser: Callable[..., Denoiser],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., TinyRun]:
    """A function: family name, fields of the search section -> a new calibrated run."""

    def make(family: str, **search: Any) -> TinyRun:
        run = tmp_path_factory.mktemp(f"run-{family}")
        recipe = make_tiny_recipe(family, **search)
        checkpoint = open_checkpoint(Path(recipe.model.checkpoint))
        denoiser = make_tiny_denoiser(family)
        found = api.search(api.Model(denoiser, checkpoint, recipe))
        made = api.calibrate(found).save(run)
        return TinyRun(run, checkpoint, denoiser, recipe, made.plan, made.tensors)

    return make


@pytest.fixture(scope="session")
def compiled_dit(make_tiny_run: Callable[..., TinyRun]) -> TinyRun:
    """The tiny DiT, W4A4 with a rank-4 branch, compiled for portable, ort and fp32."""
    tiny = make_tiny_run("dit")
    tiny.compile()
    return tiny
