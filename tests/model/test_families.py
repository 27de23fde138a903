"""A family is a subclass of Denoiser and a line in FAMILIES: no other file has to know it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.auraflow_transformer_2d import AuraFlowTransformer2DModel
from torch import Tensor

import treeq_export
from treeq_export.errors import CheckpointError
from treeq_export.model import families
from treeq_export.model.checkpoint import load_model, open_checkpoint
from treeq_export.model.conditioning import make_denoiser
from treeq_export.model.layers import discover_linears
from treeq_export.model.zoo import Denoiser
from treeq_export.recipe import ModelSection


class AuraFlowDenoiser(Denoiser):
    """A family as docs/extending.md describes it."""

    diffusers_class = "AuraFlowTransformer2DModel"

    @staticmethod
    def row_shapes_of(config: Mapping[str, Any], num_tokens: int) -> Mapping[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (num_tokens, config["joint_attention_dim"])}

    def arguments(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        return inputs | {"timestep": inputs["timestep"] / 1000}


@pytest.fixture(scope="module")
def aura_flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny AuraFlow."""
    torch.manual_seed(0)
    model = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    )
    folder = tmp_path_factory.mktemp("aura_flow")
    model.save_pretrained(folder)
    return folder


def test_a_class_that_no_family_has_is_refused(aura_flow: Path):
    with pytest.raises(CheckpointError, match="AuraFlowTransformer2DModel is not supported"):
        open_checkpoint(aura_flow)


def test_a_family_is_one_class_and_one_line(aura_flow: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, AuraFlowDenoiser))
    checkpoint = open_checkpoint(aura_flow)
    section = ModelSection(checkpoint=str(aura_flow), num_text_tokens=5)
    denoiser = make_denoiser(load_model(checkpoint), checkpoint, section)
    assert isinstance(denoiser, AuraFlowDenoiser)
    assert denoiser.input_names == ("sample", "timestep", "encoder_hidden_states")
    inputs = denoiser.make_example_inputs(2, seed=0)
    assert inputs["encoder_hidden_states"].shape == (2, 5, 24)
    expected = denoiser.model(
        hidden_states=inputs["sample"],
        encoder_hidden_states=inputs["encoder_hidden_states"],
        timestep=inputs["timestep"] / 1000,
        return_dict=False,
    )[0]
    assert torch.equal(denoiser(*inputs.values()), expected)
    blocks = {linear.name.partition(".")[0] for linear in discover_linears(denoiser)}
    assert blocks == {"joint_transformer_blocks", "single_transformer_blocks"}


def test_no_other_file_names_a_family():
    package = Path(treeq_export.__file__).parent
    named = re.compile(r"isinstance\([^)]*Denoiser\)|(DiT|PixArt|SD3|Flux)Transformer2DModel")
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if named.search(path.read_text())
    }
    assert found == {
        *(f"model/families/{family}.py" for family in ("dit", "pixart", "sd3", "flux")),
        "model/dit_original.py",  # converts one family's original files
    }
