"""The mapping is checked against a forward pass of the original network, written here anew."""

import argparse
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from treeq_export.errors import CheckpointError
from treeq_export.model.checkpoint import load_model, open_checkpoint

HIDDEN, HEADS, DEPTH, PATCH, CHANNELS, GRID, CLASSES = 384, 6, 2, 2, 4, 3, 5

State = dict[str, Tensor]


def positions(grid: int, hidden: int) -> Tensor:
    """Sin-cos of the column in the first half of the channels, of the row in the second."""
    table = np.zeros((grid, grid, hidden))
    quarter = hidden // 4
    for row in range(grid):
        for column in range(grid):
            for i in range(quarter):
                frequency = 1.0 / 10000 ** (i / quarter)
                table[row, column, i] = math.sin(column * frequency)
                table[row, column, quarter + i] = math.cos(column * frequency)
                table[row, column, 2 * quarter + i] = math.sin(row * frequency)
                table[row, column, 3 * quarter + i] = math.cos(row * frequency)
    return torch.tensor(table.reshape(1, grid * grid, hidden), dtype=torch.float32)


def make_state(learn_sigma: bool = True) -> State:
    generator = torch.Generator().manual_seed(0)
    state: State = {"pos_embed": positions(GRID, HIDDEN)}

    def add(name: str, *shape: int, bias: bool = True) -> None:
        fan_in = math.prod(shape[1:])
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / math.sqrt(fan_in)
        if bias:
            state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)

    add("x_embedder.proj", HIDDEN, CHANNELS, PATCH, PATCH)
    add("t_embedder.mlp.0", HIDDEN, 256)
    add("t_embedder.mlp.2", HIDDEN, HIDDEN)
    add("y_embedder.embedding_table", CLASSES + 1, HIDDEN, bias=False)
    for block in range(DEPTH):
        add(f"blocks.{block}.attn.qkv", 3 * HIDDEN, HIDDEN)
        add(f"blocks.{block}.attn.proj", HIDDEN, HIDDEN)
        add(f"blocks.{block}.mlp.fc1", 4 * HIDDEN, HIDDEN)
        add(f"blocks.{block}.mlp.fc2", HIDDEN, 4 * HIDDEN)
        add(f"blocks.{block}.adaLN_modulation.1", 6 * HIDDEN, HIDDEN)
    add("final_layer.linear", PATCH**2 * CHANNELS * (1 + learn_sigma), HIDDEN)
    add("final_layer.adaLN_modulation.1", 2 * HIDDEN, HIDDEN)
    return state


def original_forward(state: State, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """DiT as published: adaLN-Zero blocks on patch tokens, in float64."""
    double = {name: tensor.double() for name, tensor in state.items()}

    def linear(name: str, value: Tensor) -> Tensor:
        return functional.linear(value, double[f"{name}.weight"], double[f"{name}.bias"])

    def norm(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centered = value - value.mean(-1, keepdim=True)
        deviation = (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return centered / deviation * (1 + scale[:, None]) + shift[:, None]

    frequency = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angle = t.float()[:, None] * frequency  # float32, as the original computes it
    wave = torch.cat([angle.cos(), angle.sin()], dim=1).double()
    c = linear("t_embedder.mlp.2", functional.silu(linear("t_embedder.mlp.0", wave)))
    c = c + double["y_embedder.embedding_table.weight"][y]

    n, p = len(x), PATCH
    grid = x.shape[-1] // p
    patches = x.double().reshape(n, CHANNELS, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5)
    kernel = double["x_embedder.proj.weight"].reshape(HIDDEN, -1)
    h = patches.reshape(n, grid * grid, -1) @ kernel.T + double["x_embedder.proj.bias"]
    h = h + double["pos_embed"]

    for block in range(DEPTH):
        prefix = f"blocks.{block}"
        parts = linear(f"{prefix}.adaLN_modulation.1", functional.silu(c)).chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        qkv = linear(f"{prefix}.attn.qkv", norm(h, shift1, scale1))
        q, k, v = qkv.reshape(n, -1, 3, HEADS, HIDDEN // HEADS).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(HIDDEN // HEADS)).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(h.shape)
        h = h + gate1[:, None] * linear(f"{prefix}.attn.proj", mixed)
        inner = linear(f"{prefix}.mlp.fc1", norm(h, shift2, scale2))
        inner = functional.gelu(inner, approximate="tanh")
        h = h + gate2[:, None] * linear(f"{prefix}.mlp.fc2", inner)

    shift, scale = linear("final_layer.adaLN_modulation.1", functional.silu(c)).chunk(2, dim=1)
    out = linear("final_layer.linear", norm(h, shift, scale))
    out = out.reshape(n, grid, grid, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(n, -1, grid * p, grid * p)


def example_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((4, CHANNELS, GRID * PATCH, GRID * PATCH), generator=generator)
    return x, torch.tensor([0.0, 1.0, 537.25, 999.0]), torch.tensor([0, 4, 2, CLASSES])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "DiT-S-2.pt"
    torch.save(make_state(), path)
    return path


def save(path: Path, state: State) -> Path:
    torch.save(state, path)
    return path


def test_output_equals_the_original_network(original: Path):
    model = load_model(open_checkpoint(original)).double()
    x, t, y = example_inputs()
    output = model(x.double(), timestep=t, class_labels=y, return_dict=False)[0]
    expected = original_forward(make_state(), x, t, y)
    assert expected.std() > 0.5
    assert (output - expected).abs().max() < 1e-5
    for module in model.modules():  # what diffusers' own DiT does is another function
        if hasattr(module, "downscale_freq_shift"):
            module.downscale_freq_shift = 1
    other = model(x.double(), timestep=t, class_labels=y, return_dict=False)[0]
    assert (other - expected).abs().max() > 1e-3


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_config_is_deduced_from_shapes(learn_sigma: bool, tmp_path: Path):
    checkpoint = open_checkpoint(save(tmp_path / "small.pt", make_state(learn_sigma)))
    assert checkpoint.name == "small"
    assert checkpoint.class_name == "DiTTransformer2DModel"
    assert checkpoint.config == {
        "num_attention_heads": HEADS,
        "attention_head_dim": HIDDEN // HEADS,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS * (1 + learn_sigma),
        "num_layers": DEPTH,
        "sample_size": GRID * PATCH,
        "patch_size": PATCH,
        "num_embeds_ada_norm": CLASSES,
        "norm_eps": 1e-6,
    }


def test_position_table_is_the_one_that_diffusers_computes(original: Path):
    model = load_model(open_checkpoint(original))
    computed = model.get_buffer("pos_embed.pos_embed")
    assert (computed - positions(GRID, HIDDEN)).abs().max() < 1e-6


def test_embedders_are_shared_and_not_copied(original: Path):
    model = load_model(open_checkpoint(original))
    tables = [
        model.get_parameter(
            f"transformer_blocks.{block}.norm1.emb.class_embedder.embedding_table.weight"
        )
        for block in range(DEPTH)
    ]
    assert len({table.data_ptr() for table in tables}) == 1


@pytest.mark.parametrize("key", ["ema", "model"])
def test_training_checkpoint_is_unwrapped(key: str, original: Path, tmp_path: Path):
    state = make_state()
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    wrapped = {"model": other, key: state, "args": argparse.Namespace(lr=1e-4)}
    loaded = load_model(open_checkpoint(save(tmp_path / "train.pt", wrapped)))
    expected = load_model(open_checkpoint(original)).state_dict()
    assert all(torch.equal(loaded.state_dict()[name], expected[name]) for name in expected)


def test_old_file_format_is_read(original: Path, tmp_path: Path):
    path = tmp_path / "old.pt"
    torch.save(make_state(), path, _use_new_zipfile_serialization=False)
    loaded = load_model(open_checkpoint(path)).state_dict()
    expected = load_model(open_checkpoint(original)).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def fails_with(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model(open_checkpoint(path))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("table", "word"),
    [
        (positions(GRID, HIDDEN).flip(1), "differs from the fixed sin-cos table by 1"),
        (positions(GRID, HIDDEN) + float("nan"), "by nan"),
        (positions(GRID, HIDDEN // 2), "received shape (1, 9, 192)"),
        (positions(GRID, HIDDEN)[:, :7], "received 7 positions"),
        (positions(GRID, HIDDEN)[0], "received (9, 384)"),
    ],
)
def test_another_position_table_is_refused(table: Tensor, word: str, tmp_path: Path):
    fails_with(save(tmp_path / "a.pt", make_state() | {"pos_embed": table}), "pos_embed", word)


def test_half_precision_table_is_accepted(tmp_path: Path):
    half = {name: tensor.half() for name, tensor in make_state().items()}
    model = load_model(open_checkpoint(save(tmp_path / "half.pt", half)))
    assert torch.equal(
        model.get_parameter("proj_out_2.weight"), half["final_layer.linear.weight"].float()
    )


def test_unknown_width_is_refused_since_heads_are_unknown(tmp_path: Path):
    state = make_state() | {"x_embedder.proj.weight": torch.zeros(400, 4, 2, 2)}
    fails_with(save(tmp_path / "a.pt", state), "hidden size 400", "384, 768, 1024, 1152")


def test_state_of_another_network_is_refused(tmp_path: Path):
    path = save(tmp_path / "a.pt", {"conv.weight": torch.zeros(3)})
    fails_with(path, "x_embedder.proj.weight", "no original DiT")


def test_missing_tensor_is_named_as_diffusers_names_it(tmp_path: Path):
    state = make_state()
    del state["blocks.1.mlp.fc2.bias"]
    fails_with(save(tmp_path / "a.pt", state), "transformer_blocks.1.ff.net.2.bias", "missing")


@pytest.mark.parametrize("name", ["blocks.0.attn.q_norm.weight", "blocks.1.scale", "extra.bias"])
def test_unknown_tensor_is_named_as_it_is(name: str, tmp_path: Path):
    state = make_state() | {name: torch.zeros(HIDDEN)}
    fails_with(save(tmp_path / "a.pt", state), f"{name}: unexpected")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.zeros(2)])
def test_file_without_state_dict_is_refused(content: object, tmp_path: Path):
    path = tmp_path / "a.pt"
    torch.save(content, path)
    fails_with(path, "a.pt", "no state dict")


def test_truncated_file_is_refused(original: Path, tmp_path: Path):
    path = tmp_path / "cut.pt"
    path.write_bytes(original.read_bytes()[:100_000])
    fails_with(path, "cut.pt", "cannot be read as tensors")


def test_file_that_would_execute_code_is_refused(tmp_path: Path):
    path, witness = tmp_path / "evil.pt", tmp_path / "witness"
    torch.save({"pos_embed": _Evil(witness)}, path)
    fails_with(path, "evil.pt", "save only its state dict")
    assert not witness.exists()


class _Evil:
    """Touches a file when unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.witness,)
