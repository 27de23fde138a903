"""Variants, `.bin` files, caches, LoRA and single files: what is read, and what is said."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from treeq_export.errors import CheckpointError
from treeq_export.model import weight_files
from treeq_export.model.checkpoint import load_model, open_checkpoint
from treeq_export.model.families import CLASS_NAMES
from treeq_export.model.weight_files import WEIGHTS_FILE, find_weights, model_folder, model_name

FIRST = "transformer_blocks.0.attn1.to_q.weight"


@pytest.fixture
def dit(tiny_checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of the tiny DiT."""
    return Path(shutil.copytree(tiny_checkpoints / "dit", tmp_path / "dit"))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS_FILE)


def write_shards(folder: Path, pattern: str, index: str) -> None:
    tensors = tensors_of(folder)
    (folder / WEIGHTS_FILE).unlink()
    weight_map = {}
    for at, name in enumerate(sorted(tensors)):
        weight_map[name] = pattern.format(1 + at % 2)
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name, shard in weight_map.items() if shard == file}
        if file.endswith(".bin"):
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file)
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))


def message(path: Path, variant: str | None = None, *, load: bool = False) -> str:
    if load:
        checkpoint = open_checkpoint(path, variant)
        with pytest.raises(CheckpointError) as caught:
            load_model(checkpoint)
    else:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path, variant)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "index", "variant"),
    [
        ("diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors",
         "diffusion_pytorch_model.safetensors.index.fp16.json", "fp16"),
        ("diffusion_pytorch_model-0000{}-of-00002.fp16.safetensors",
         "diffusion_pytorch_model.fp16.safetensors.index.json", "fp16"),
        ("diffusion_pytorch_model-0000{}-of-00002.bin",
         "diffusion_pytorch_model.bin.index.json", None),
        ("diffusion_pytorch_model.bf16-0000{}-of-00002.bin",
         "diffusion_pytorch_model.bin.index.bf16.json", "bf16"),
        ("pytorch_model-0000{}-of-00002.bin", "pytorch_model.bin.index.json", None),
    ],
)  # fmt: skip
def test_shards_under_every_name(dit: Path, pattern: str, index: str, variant: str | None):
    expected = tensors_of(dit)
    write_shards(dit, pattern, index)
    checkpoint = open_checkpoint(dit)
    assert [file.name for file in checkpoint.files] == [pattern.format(1), pattern.format(2)]
    assert any(f"variant {variant}" in note for note in checkpoint.notes) == (variant is not None)
    state = load_model(checkpoint).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16.bin",
             "diffusion_pytorch_model.bin", "pytorch_model.bin", "pytorch_model.fp16.bin"]
)  # fmt: skip
def test_one_file_under_every_name(dit: Path, name: str):
    expected = tensors_of(dit)
    (dit / WEIGHTS_FILE).unlink()
    if name.endswith(".bin"):
        torch.save(expected, dit / name)
    else:
        save_file(expected, dit / name)
    checkpoint = open_checkpoint(dit)
    assert [file.name for file in checkpoint.files] == [name]
    state = load_model(checkpoint).state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())


def test_no_variant_goes_before_one_and_safetensors_before_bin(dit: Path):
    for name in ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"):
        shutil.copy(dit / WEIGHTS_FILE, dit / name)
    assert find_weights(dit, None) == ((dit / WEIGHTS_FILE,), None)
    fp16 = dit / "diffusion_pytorch_model.fp16.safetensors"
    assert find_weights(dit, "fp16") == ((fp16,), None)


def test_a_choice_of_variants_is_left_to_the_user(dit: Path):
    for variant in ("fp16", "bf16"):
        shutil.copy(dit / WEIGHTS_FILE, dit / f"diffusion_pytorch_model.{variant}.safetensors")
    (dit / WEIGHTS_FILE).unlink()
    assert "variants bf16, fp16. Choose one with model.variant" in message(dit)
    assert "no weights of variant int8; there is" in message(dit, "int8")
    assert open_checkpoint(dit, "bf16").files[0].name.endswith("bf16.safetensors")


def test_an_index_names_itself_when_a_shard_is_missing(dit: Path):
    index = "diffusion_pytorch_model.safetensors.index.fp16.json"
    write_shards(dit, "diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors", index)
    (dit / "diffusion_pytorch_model.fp16-00002-of-00002.safetensors").unlink()
    assert f"00002-of-00002.safetensors: missing, but named by {index}" in message(dit)


def test_a_link_to_nothing_is_named(dit: Path):
    (dit / WEIGHTS_FILE).unlink()
    (dit / WEIGHTS_FILE).symlink_to("../blobs/0123")
    assert f"{WEIGHTS_FILE}: a link to ../blobs/0123, which is not there" in message(dit)


def test_weights_without_permission_are_not_called_damaged(
    dit: Path, monkeypatch: pytest.MonkeyPatch
):
    opened = Path.open

    def refuse(path: Path, *args: object, **kwargs: object) -> object:
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", refuse)
    assert "cannot be read (Permission denied). Give this user permission" in message(dit)


def test_pixart_alpha_s_null_caption_is_left_out_and_said(tiny_checkpoints: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_checkpoints / "pixart", tmp_path / "alpha"))
    tensors = tensors_of(folder)
    save_file(tensors | {"caption_projection.y_embedding": torch.ones(4, 4)}, folder / WEIGHTS_FILE)
    checkpoint = open_checkpoint(folder)
    assert [note for note in checkpoint.notes if "y_embedding is not used" in note]
    assert set(load_model(checkpoint).state_dict()) == set(tensors)


def test_other_extra_tensors_are_refused_for_every_family(dit: Path, tiny_checkpoints: Path):
    tensors = tensors_of(dit)
    save_file(tensors | {"caption_projection.y_embedding": torch.ones(4)}, dit / WEIGHTS_FILE)
    assert "caption_projection.y_embedding: unexpected" in message(dit, load=True)
    save_file(tensors | {"to_q.lora_A.weight": torch.ones(4)}, dit / WEIGHTS_FILE)
    assert "It is part of a LoRA adapter" in message(dit, load=True)


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "gguf", None])
def test_a_quantized_model_is_refused_by_its_method(dit: Path, method: str | None):
    config = json.loads((dit / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method} if method else {}
    (dit / "config.json").write_text(json.dumps(config))
    said = message(dit)
    assert f"already quantized by {method or 'an unnamed method'}" in said
    assert "before quantization" in said


def test_no_other_class_of_diffusers_is_taken_for_a_typo(dit: Path):
    import diffusers

    others = {
        name
        for name in dir(diffusers)
        if "Transformer" in name and not name.startswith("Dummy") and name not in CLASS_NAMES
    }
    others |= {"Flux4Transformer2DModel", "SD35Transformer2DModel", "UNet2DConditionModel"}
    assert len(others) > 50
    config = json.loads((dit / "config.json").read_text())
    for name in sorted(others - {"Transformer2DModel"}):
        (dit / "config.json").write_text(json.dumps(config | {"_class_name": name}))
        said = message(dit)
        assert "Did you mean" not in said, name
        assert f"{name} is not supported" in said


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("FluxTransformer2DModle", 3), ("PixartTransformer2DModel", 1), ("DitTransformer2DModel", 0),
     ("PixArtTransfomer2DModel", 1), ("SD3transformer2DModel", 2), ("FluxTransformer", 3)],
)  # fmt: skip
def test_a_typo_gets_the_name(dit: Path, typo: str, meant: int):
    config = json.loads((dit / "config.json").read_text())
    (dit / "config.json").write_text(json.dumps(config | {"_class_name": typo}))
    assert f"Did you mean {CLASS_NAMES[meant]}?" in message(dit)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.lora_A.weight", "a.lora_B.weight"], ["LoRA adapter", "fuse_lora()"]),
        (["lora_unet_x.lora_down.weight", "lora_unet_x.alpha"], ["LoRA adapter"]),
        (["double_blocks.0.img_attn.qkv.weight"],
         ["single-file", "FluxTransformer2DModel.from_single_file"]),
        (["model.diffusion_model.joint_blocks.0.x"],
         ["ComfyUI", "SD3Transformer2DModel.from_single_file"]),
        (["model.diffusion_model.pos_embed.proj.weight"], ["ComfyUI", "CLASS.from_single_file"]),
        (["something.weight"], ["Give a folder that diffusers' save_pretrained wrote"]),
    ],
)  # fmt: skip
def test_a_single_file_is_explained(tmp_path: Path, names: list[str], words: list[str]):
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(1) for name in names}, file)
    for said in (message(file), message(tmp_path)):
        assert all(word in said for word in words), said


def test_a_gguf_file_is_quantized_already(tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "before quantization" in message(tmp_path / "model.gguf")
    assert "before quantization" in message(tmp_path)


def rename(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def test_weights_with_a_prefix_are_explained(dit: Path):
    tensors = tensors_of(dit)
    save_file(rename("model.diffusion_model.")(tensors), dit / WEIGHTS_FILE)
    assert "names that begin with model.diffusion_model." in message(dit, load=True)


def test_an_adapter_folder_is_explained(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "a LoRA adapter. Fuse it" in message(tmp_path)


def make_cache(tmp_path: Path, dit: Path) -> Path:
    root = tmp_path / "models--org--tiny-dit"
    shutil.copytree(dit, root / "snapshots" / "abc" / "transformer")
    return root


@pytest.mark.parametrize("with_ref", [True, False])
def test_a_repository_in_the_cache_is_its_main_revision(dit: Path, tmp_path: Path, with_ref: bool):
    root = make_cache(tmp_path, dit)
    if with_ref:
        shutil.copytree(root / "snapshots" / "abc", root / "snapshots" / "older")
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text("abc\n")
    checkpoint = open_checkpoint(root)
    assert checkpoint.name == "tiny-dit"
    assert checkpoint.files == (root / "snapshots/abc/transformer" / WEIGHTS_FILE,)
    assert checkpoint.sha256 == open_checkpoint(dit).sha256


def test_a_repository_without_a_revision_is_explained(dit: Path, tmp_path: Path):
    root = make_cache(tmp_path, dit)
    shutil.copytree(root / "snapshots" / "abc", root / "snapshots" / "older")
    assert "a repository of the Hugging Face cache whose main revision" in message(root)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("gone")
    assert model_folder(root) is None


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/a/pipe/transformer", "pipe"),
        ("/a/models--x--y/snapshots/0123", "y"),
        ("/a/models--x--y", "y"),
        ("/a/my-model", "my-model"),
    ],
)
def test_names(path: str, name: str):
    assert model_name(Path(path)) == name


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("black-forest-labs/FLUX.1-dev",
         ["black-forest-labs/FLUX.1-dev", "hub id", "hf download black-forest-labs/FLUX.1-dev"]),
        ("https://huggingface.co/facebook/DiT-XL-2-256",
         ["a URL", "`hf download facebook/DiT-XL-2-256 --local-dir DiT-XL-2-256`"]),
        ("gone", ["no such file or folder. Set model.checkpoint"]),
    ],
)  # fmt: skip
def test_a_hub_id_is_explained(tmp_path: Path, given: str, words: list[str]):
    said = message(tmp_path / given)
    assert all(word in said for word in words), said


def test_a_home_folder_is_expanded(dit: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(dit.parent))
    assert open_checkpoint(Path("~/dit")).sha256 == open_checkpoint(dit).sha256


def test_nothing_of_an_index_is_believed(dit: Path):
    index = dit / "diffusion_pytorch_model.safetensors.index.json"
    (dit / WEIGHTS_FILE).unlink()
    for content in ("[", "[1]", "{}", '{"weight_map": []}'):
        index.write_text(content)
        assert index.name in message(dit)
    index.write_text(json.dumps({"weight_map": {FIRST: "../other.safetensors"}}))
    assert "missing, but named by" in message(dit)
    assert index.name == weight_files.INDEX_FILE
