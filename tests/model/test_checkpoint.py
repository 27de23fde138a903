import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load, save_file
from torch import Tensor

from treeq_export.errors import CheckpointError
from treeq_export.model.checkpoint import load_model, open_checkpoint
from treeq_export.model.families import CLASS_NAMES

WEIGHTS = "diffusion_pytorch_model.safetensors"
WEIGHT = "transformer_blocks.1.attn1.to_q.weight"


@pytest.fixture
def dit(tiny_checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of the tiny DiT that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoints / "dit", tmp_path / "dit"))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read a copy: load_file would map the file that the test is about to overwrite."""
    return load((folder / WEIGHTS).read_bytes())


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = read_weights(folder)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def shard(folder: Path) -> list[str]:
    """Split the weights in two files with an index, as save_pretrained does above 10 GB."""
    tensors = read_weights(folder)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    files = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {}
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


def fails_with(path: Path, *words: str, load: bool = False) -> None:
    """Check that opening (or loading) gives one line that holds every word."""

    def attempt() -> None:
        checkpoint = open_checkpoint(path)
        if load:
            load_model(checkpoint)

    with pytest.raises(CheckpointError) as caught:
        attempt()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("family", ["dit", "pixart", "sd3", "flux"])
def test_outputs_equal_those_of_from_pretrained(
    family: str, tiny_checkpoints: Path, make_tiny_denoiser
):
    denoiser = make_tiny_denoiser(family)
    inputs = list(denoiser.make_example_inputs(2, seed=1).values())
    ours = denoiser(*inputs)
    kind = getattr(diffusers, denoiser.class_name)
    theirs = kind.from_pretrained(tiny_checkpoints / family, low_cpu_mem_usage=False).eval()
    denoiser.model = theirs
    assert torch.equal(ours, denoiser(*inputs))
    assert ours.std() > 0.1


@pytest.mark.parametrize("family", ["dit", "pixart", "sd3", "flux"])
def test_loaded_model_is_frozen_float32_in_evaluation_mode(family: str, tiny_checkpoints: Path):
    model = load_model(open_checkpoint(tiny_checkpoints / family))
    tensors = [*model.parameters(), *model.buffers()]
    assert {(t.dtype, t.device.type, t.requires_grad) for t in tensors} == {
        (torch.float32, "cpu", False)
    }
    assert not any(module.training for module in model.modules())


def test_open_reads_name_class_config_and_files(tiny_checkpoints: Path):
    checkpoint = open_checkpoint(tiny_checkpoints / "dit")
    assert (checkpoint.name, checkpoint.class_name) == ("dit", "DiTTransformer2DModel")
    assert checkpoint.config["num_layers"] == 2
    assert not [key for key in checkpoint.config if key.startswith("_")]
    assert [file.name for file in checkpoint.files] == [WEIGHTS]


def test_digest_follows_the_content_and_not_the_path(tiny_checkpoints: Path, dit: Path):
    original = open_checkpoint(tiny_checkpoints / "dit").sha256
    assert open_checkpoint(dit).sha256 == original
    edit_config(dit, _diffusers_version="0.0.1", _name_or_path="elsewhere")
    assert open_checkpoint(dit).sha256 == original
    edit_config(dit, norm_eps=1e-4)
    changed_config = open_checkpoint(dit).sha256
    edit_config(dit, norm_eps=1e-5)
    edit_weights(dit, lambda tensors: tensors[WEIGHT].mul_(2))
    assert len({original, changed_config, open_checkpoint(dit).sha256}) == 3


def test_pipeline_folder_is_its_transformer(dit: Path, tmp_path: Path):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(dit, pipeline / "transformer")
    (pipeline / "model_index.json").write_text("{}")
    checkpoint = open_checkpoint(pipeline)
    assert checkpoint.name == "pipeline"
    assert checkpoint.sha256 == open_checkpoint(dit).sha256


def test_shards_load_like_one_file(dit: Path):
    whole = load_model(open_checkpoint(dit)).state_dict()
    files = shard(dit)
    checkpoint = open_checkpoint(dit)
    assert [file.name for file in checkpoint.files] == files
    parts = load_model(checkpoint).state_dict()
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_missing_shard_is_named(dit: Path):
    (dit / shard(dit)[1]).unlink()
    fails_with(dit, "00002-of-00002", "missing", "Download this shard")


def test_shard_outside_of_the_folder_is_refused(dit: Path, tiny_checkpoints: Path):
    (dit / WEIGHTS).unlink()
    outside = str(tiny_checkpoints / "dit" / WEIGHTS)
    (dit / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {WEIGHT: outside}}))
    fails_with(dit, "named by")


@pytest.mark.parametrize("weight_map", [None, {}, "everything"])
def test_index_without_weight_map(dit: Path, weight_map: object):
    (dit / WEIGHTS).unlink()
    (dit / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    fails_with(dit, "index.json", "no weight_map")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(dit: Path, dtype: torch.dtype):
    tensors = read_weights(dit)
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, dit / WEIGHTS)
    weight = load_model(open_checkpoint(dit)).get_parameter(WEIGHT)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, tensors[WEIGHT].to(dtype).to(torch.float32))


def test_published_class_name_and_torch_file_are_understood(dit: Path):
    expected = load_model(open_checkpoint(dit)).get_parameter(WEIGHT)
    torch.save(read_weights(dit), dit / "diffusion_pytorch_model.bin")
    (dit / WEIGHTS).unlink()
    edit_config(dit, _class_name="Transformer2DModel", num_vector_embeds=None)
    checkpoint = open_checkpoint(dit)
    assert checkpoint.class_name == "DiTTransformer2DModel"
    assert torch.equal(load_model(checkpoint).get_parameter(WEIGHT), expected)


def test_changing_a_loaded_model_leaves_the_file_alone(dit: Path):
    before = (dit / WEIGHTS).read_bytes()
    model = load_model(open_checkpoint(dit))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (dit / WEIGHTS).read_bytes() == before


def test_no_such_path(tmp_path: Path):
    fails_with(tmp_path / "nowhere", "nowhere", "no such file", "model.checkpoint")


def test_a_weight_file_instead_of_its_folder(dit: Path):
    fails_with(dit / WEIGHTS, "received a .safetensors file", "folder")


def test_missing_config(dit: Path):
    (dit / "config.json").unlink()
    fails_with(dit, "no config.json", "transformer/", "save_pretrained")


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"{", "not JSON"), (b"\xff\xfe\xfa", "not UTF-8"), (b"[1]", "received a list")],
)
def test_invalid_config(dit: Path, content: bytes, word: str):
    (dit / "config.json").write_bytes(content)
    fails_with(dit, "config.json", word, "again")


def test_misspelt_class_gets_a_hint(dit: Path):
    edit_config(dit, _class_name="DiTTransformer2D")
    fails_with(dit, "DiTTransformer2D", "Did you mean DiTTransformer2DModel?", *CLASS_NAMES)


@pytest.mark.parametrize("class_name", [None, "UNet2DConditionModel", "Transformer2DModel"])
def test_unknown_class_lists_the_known(dit: Path, class_name: str | None):
    edit_config(dit, _class_name=class_name, norm_type="layer_norm")
    fails_with(dit, str(class_name), "is not supported", *CLASS_NAMES)


def test_missing_weights(dit: Path):
    (dit / WEIGHTS).unlink()
    fails_with(dit, "no weights", WEIGHTS)


@pytest.mark.parametrize("keep", [0, 5, 1000, -100])
def test_truncated_weights(dit: Path, keep: int):
    content = (dit / WEIGHTS).read_bytes()[:keep]
    (dit / WEIGHTS).write_bytes(content)
    fails_with(dit, WEIGHTS, "no complete safetensors file", "Download it again")


def test_header_of_garbage(dit: Path):
    (dit / WEIGHTS).write_bytes(b"\x10" + bytes(7) + b"not a header, no")
    fails_with(dit, WEIGHTS, "Download it again")


def test_missing_tensor_is_named_with_its_near_namesake(dit: Path):
    edit_weights(dit, lambda tensors: tensors.update({WEIGHT + "s": tensors.pop(WEIGHT)}))
    fails_with(dit, WEIGHT, f"there is {WEIGHT}s", "one of 1 missing", load=True)


def test_unexpected_tensor_is_named(dit: Path):
    edit_weights(dit, lambda tensors: tensors.update(lora=torch.zeros(1)))
    fails_with(dit, "lora: unexpected", "one of 1", load=True)


def test_wrong_shape_states_both(dit: Path):
    edit_weights(dit, lambda tensors: tensors.update({WEIGHT: torch.zeros(64, 32)}))
    fails_with(dit, WEIGHT, "received shape (64, 32)", "expected (64, 64)", load=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_are_named_and_counted(dit: Path, bad: float):
    edit_weights(dit, lambda tensors: tensors[WEIGHT][0, :3].fill_(bad))
    fails_with(dit, WEIGHT, "3 of 4096 weights are NaN or infinite", load=True)


def test_quantized_weights_are_refused(dit: Path):
    edit_weights(
        dit, lambda tensors: tensors.update({WEIGHT: torch.zeros(64, 64, dtype=torch.int8)})
    )
    fails_with(dit, WEIGHT, "received int8", "before quantization", load=True)


@pytest.mark.parametrize(
    "changes", [{"num_layers": "six"}, {"norm_type": "ada_norm"}, {"patch_size": 0}]
)
def test_config_that_describes_no_network(dit: Path, changes: dict[str, object]):
    edit_config(dit, **changes)
    fails_with(dit, "describes no DiTTransformer2DModel", "config.json", load=True)


def test_nothing_touches_the_network(dit: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    model = load_model(open_checkpoint(dit))
    assert sum(p.numel() for p in model.parameters()) > 100_000
