"""The autoencoder of `serve --vae`: every form of its weights, under the name that is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from treeq_export.errors import ServeError
from treeq_export.serve.vae import open_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny autoencoder of two levels; read-only."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    folder = tmp_path_factory.mktemp("pipeline") / "vae"
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=4,
    ).save_pretrained(folder)
    return folder


def as_is(_folder: Path) -> None:
    pass


def as_variant(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.safetensors")


def as_torch_file(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


@pytest.mark.parametrize("change", [as_is, as_variant, as_torch_file])
def test_what_is_copied_loads_with_equal_weights(
    change: Callable[[Path], None], vae: Path, tmp_path: Path
):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    folder = Path(shutil.copytree(vae.parent, tmp_path / "pipeline"))
    change(folder / "vae")
    opened = open_vae(folder, (4, 8, 8))
    assert (opened.factor, opened.channels) == (2, 3)
    served = tmp_path / "served"
    served.mkdir()
    for name, file in opened.files.items():
        shutil.copyfile(file, served / name)
    loaded: Any = AutoencoderKL.from_pretrained(str(served))
    expected = load_file(vae / WEIGHTS)
    assert all(torch.equal(loaded.state_dict()[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("shards", "words"), [(0, ["no weights"]), (2, ["2 shards of weights", "max_shard_size"])]
)
def test_weights_that_are_no_single_file(shards: int, words: list[str], vae: Path, tmp_path: Path):
    folder = Path(shutil.copytree(vae, tmp_path / "vae"))
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    if shards:
        names = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        for name in names:
            (folder / name).write_bytes(weights)
        index = {"weight_map": dict(zip("ab", names, strict=True))}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(ServeError) as caught:
        open_vae(folder, (4, 8, 8))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value
