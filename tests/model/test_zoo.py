from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from treeq_export.errors import CheckpointError, RecipeError
from treeq_export.model.checkpoint import Checkpoint, load_model, open_checkpoint
from treeq_export.model.conditioning import make_denoiser
from treeq_export.model.zoo import Denoiser
from treeq_export.recipe import ModelSection

FAMILIES = ["dit", "pixart", "sd3", "flux"]
TEXT_FAMILIES = FAMILIES[1:]
INPUT_NAMES = {
    "dit": ("sample", "timestep", "class_labels"),
    "pixart": ("sample", "timestep", "encoder_hidden_states", "encoder_attention_mask"),
    "sd3": ("sample", "timestep", "encoder_hidden_states", "pooled_projections"),
    "flux": ("sample", "timestep", "encoder_hidden_states", "pooled_projections", "guidance"),
}
SAMPLE_SHAPES = {"dit": (4, 8, 8), "pixart": (4, 8, 8), "sd3": (4, 8, 8), "flux": (16, 16)}
MakeDenoiser = Callable[..., Denoiser]


def open_tiny(folder: Path, family: str, **section: Any) -> tuple[Checkpoint, ModelSection]:
    checkpoint = open_checkpoint(folder / family)
    return checkpoint, ModelSection(checkpoint=str(checkpoint.path), **section)


@pytest.mark.parametrize("family", FAMILIES)
def test_calling_convention(family: str, make_tiny_denoiser: MakeDenoiser):
    denoiser = make_tiny_denoiser(family)
    assert denoiser.input_names == INPUT_NAMES[family]
    assert denoiser.sample_shape == SAMPLE_SHAPES[family]
    assert not denoiser.training
    inputs = denoiser.make_example_inputs(3, seed=0)
    assert tuple(inputs) == denoiser.input_names
    for name, tensor in inputs.items():
        assert len(tensor) == 3
        assert tensor.dtype == (torch.int64 if name == "class_labels" else torch.float32)
    output = denoiser(*inputs.values())
    learned_sigma = family in ("dit", "pixart")
    channels = denoiser.sample_shape[0] * (1 + learned_sigma)
    assert output.shape == (3, channels, *denoiser.sample_shape[1:])
    prediction = denoiser.prediction(output)
    assert prediction.shape == inputs["sample"].shape
    assert torch.equal(prediction, output[:, : denoiser.sample_shape[0]])


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_do_not_depend_on_each_other(family: str, make_tiny_denoiser: MakeDenoiser):
    denoiser = make_tiny_denoiser(family)
    inputs = denoiser.make_example_inputs(3, seed=2)
    together = denoiser(*inputs.values())
    alone = torch.cat([denoiser(*(t[i : i + 1] for t in inputs.values())) for i in range(3)])
    assert (together - alone).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_input_matters(family: str, make_tiny_denoiser: MakeDenoiser):
    denoiser = make_tiny_denoiser(family)
    inputs = denoiser.make_example_inputs(2, seed=3)
    before = denoiser(*inputs.values())
    for name, tensor in inputs.items():
        changed = (tensor + 1) % 2 if name.endswith(("labels", "mask")) else tensor * 0.5
        if name == "encoder_attention_mask":
            changed[:, 0] = 1  # a row without any token is no text
        after = denoiser(*(inputs | {name: changed}).values())
        assert (after - before).abs().max() > 1e-4, name


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_are_deterministic_and_follow_the_seed(
    family: str, make_tiny_denoiser: MakeDenoiser
):
    denoiser = make_tiny_denoiser(family)
    first, again, other = (denoiser.make_example_inputs(4, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["sample"], other["sample"])
    assert first["timestep"].min() >= 0
    assert first["timestep"].max() < 1000


def test_labels_cycle_and_the_null_class_comes_last(make_tiny_denoiser: MakeDenoiser):
    denoiser = make_tiny_denoiser("dit")
    assert denoiser.conditioning_source == "labels"
    labels = denoiser.make_conditioning(12, seed=5)["class_labels"]
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert denoiser.null_conditioning(2)["class_labels"].tolist() == [10, 10]


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_random_text_is_seeded_and_null_text_is_zero(family: str, make_tiny_denoiser: MakeDenoiser):
    denoiser = make_tiny_denoiser(family, num_text_tokens=5)
    assert denoiser.conditioning_source == "random"
    first, again, other = (denoiser.make_conditioning(3, seed) for seed in (0, 0, 1))
    assert first["encoder_hidden_states"].shape == (3, 5, 32)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder_hidden_states"], other["encoder_hidden_states"])
    null = denoiser.null_conditioning(3)
    assert {name: t.shape for name, t in null.items()} == {n: t.shape for n, t in first.items()}
    assert not null["encoder_hidden_states"].any()
    if family == "pixart":
        assert first["encoder_attention_mask"].eq(1).all()
        assert null["encoder_attention_mask"].eq(1).all()
    if family == "flux":
        assert torch.equal(first["guidance"], null["guidance"])


def test_pixart_ignores_masked_tokens(make_tiny_denoiser: MakeDenoiser):
    denoiser = make_tiny_denoiser("pixart", num_text_tokens=6)
    inputs = denoiser.make_example_inputs(2, seed=0)
    inputs["encoder_attention_mask"][:, 4:] = 0
    before = denoiser(*inputs.values())
    inputs["encoder_hidden_states"][:, 4:] = 7.0
    assert (denoiser(*inputs.values()) - before).abs().max() < 1e-5


def test_pixart_without_size_conditions(tiny_checkpoints: Path):
    import diffusers

    checkpoint, section = open_tiny(tiny_checkpoints, "pixart", num_text_tokens=4)
    kind = getattr(diffusers, checkpoint.class_name)
    model = kind(**(checkpoint.config | {"use_additional_conditions": False})).eval()
    denoiser = make_denoiser(model, checkpoint, section)
    inputs = denoiser.make_example_inputs(2, seed=0)
    expected = model(
        inputs["sample"],
        timestep=inputs["timestep"],
        encoder_hidden_states=inputs["encoder_hidden_states"],
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample
    assert (denoiser(*inputs.values()) - expected).abs().max() < 1e-5


def test_flux_counts_timesteps_to_1000_and_knows_positions(make_tiny_denoiser: MakeDenoiser):
    denoiser = make_tiny_denoiser("flux", num_text_tokens=3)
    ids = denoiser.get_buffer("img_ids")
    assert ids.tolist()[:5] == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 3], [0, 1, 0]]
    inputs = denoiser.make_example_inputs(2, seed=0)
    expected = denoiser.model(
        hidden_states=inputs["sample"],
        timestep=inputs["timestep"] / 1000,
        encoder_hidden_states=inputs["encoder_hidden_states"],
        pooled_projections=inputs["pooled_projections"],
        guidance=inputs["guidance"],
        img_ids=ids,
        txt_ids=torch.zeros(3, 3),
        return_dict=False,
    )[0]
    assert torch.equal(denoiser(*inputs.values()), expected)


def test_flux_without_guidance_has_no_such_input(tiny_checkpoints: Path):
    checkpoint, section = open_tiny(tiny_checkpoints, "flux", latent_size=8)
    import diffusers

    kind = getattr(diffusers, checkpoint.class_name)
    model = kind(**(checkpoint.config | {"guidance_embeds": False}))
    denoiser = make_denoiser(model, checkpoint, section)
    assert denoiser.input_names[-1] == "pooled_projections"
    with torch.no_grad():
        output = denoiser(*denoiser.make_example_inputs(1, seed=0).values())
    assert output.isfinite().all()


@pytest.mark.parametrize("family", ["dit", "pixart", "sd3"])
def test_latent_size_of_recipe_goes_before_that_of_config(
    family: str, tiny_checkpoints: Path, make_tiny_denoiser: MakeDenoiser
):
    assert make_tiny_denoiser(family, latent_size=None).sample_shape == (4, 8, 8)
    denoiser = make_tiny_denoiser(family, latent_size=12)
    assert denoiser.sample_shape == (4, 12, 12)
    assert denoiser(*denoiser.make_example_inputs(1, seed=0).values()).shape[-2:] == (12, 12)


@pytest.mark.parametrize(
    ("family", "latent_size", "words"),
    [
        ("dit", 7, ["received 7", "patch size 2", "nearest is 8"]),
        ("dit", 1, ["received 1", "nearest is 2"]),
        ("sd3", 14, ["received 14", "at most 12"]),
        ("flux", None, ["model.latent_size: missing", "128 for 1024"]),
        ("flux", 9, ["received 9", "even", "nearest is 10"]),
    ],
)
def test_latent_size_that_does_not_fit(
    family: str, latent_size: int | None, words: list[str], make_tiny_denoiser: MakeDenoiser
):
    with pytest.raises(RecipeError) as caught:
        make_tiny_denoiser(family, latent_size=latent_size)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(("family", "out_channels"), [("dit", 5), ("flux", 32)])
def test_output_that_predicts_no_sample_is_refused(
    family: str, out_channels: int, tiny_checkpoints: Path
):
    import diffusers

    checkpoint, section = open_tiny(tiny_checkpoints, family, latent_size=8)
    kind = getattr(diffusers, checkpoint.class_name)
    model = kind(**(checkpoint.config | {"out_channels": out_channels}))
    with pytest.raises(CheckpointError, match=f"received out_channels {out_channels}"):
        make_denoiser(model, checkpoint, section)


def make_prompts(denoiser: Denoiser, num: int, num_tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    prompts = {}
    for name, shape in denoiser.row_shapes.items():
        tokens = (num_tokens, *shape[1:]) if name.startswith("encoder_") else shape
        prompts[name] = torch.rand((num, *tokens), generator=generator)
    return prompts


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_prompts_come_from_the_file_and_cycle(
    family: str, make_tiny_denoiser: MakeDenoiser, tmp_path: Path
):
    prompts = make_prompts(make_tiny_denoiser(family), num=2, num_tokens=7)
    half = {name: rows.half() for name, rows in prompts.items()}
    save_file(half, tmp_path / "prompts.safetensors")
    denoiser = make_tiny_denoiser(family, conditioning=str(tmp_path / "prompts.safetensors"))
    assert denoiser.conditioning_source == "file"
    conditioning = denoiser.make_conditioning(3, seed=0)
    for name, rows in half.items():
        assert torch.equal(conditioning[name], rows.float()[[0, 1, 0]])
    assert denoiser.null_conditioning(3)["encoder_hidden_states"].shape == (3, 7, 32)
    assert denoiser(*denoiser.make_example_inputs(3, seed=0).values()).isfinite().all()


def remove_pooled(prompts: dict[str, Tensor]) -> Mapping[str, Tensor]:
    return {name: rows for name, rows in prompts.items() if name != "pooled_projections"}


def put_nan(prompts: dict[str, Tensor]) -> Mapping[str, Tensor]:
    prompts["encoder_hidden_states"][0, 0, 0] = float("nan")
    return prompts


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove_pooled, ["received tensors encoder_hidden_states", "expected", "pooled"]),
        (lambda p: p | {"mask": torch.ones(2)}, ["received tensors", "mask"]),
        (
            lambda p: p | {"pooled_projections": torch.ones(3, 48)},
            ["pooled_projections: received shape (3, 48), expected (2, 48)"],
        ),
        (
            lambda p: p | {"encoder_hidden_states": torch.ones(2, 7, 31)},
            ["encoder_hidden_states: received shape (2, 7, 31), expected (2, 7, 32)"],
        ),
        (
            lambda p: p | {"encoder_hidden_states": torch.ones(2, 32)},
            ["received shape (2, 32), expected (2, 16, 32)"],
        ),
        (
            lambda p: {name: rows[:0] for name, rows in p.items()},
            ["received shape (0, 7, 32)", "one row per prompt"],
        ),
        (put_nan, ["encoder_hidden_states: holds NaN"]),
    ],
)
def test_conditioning_file_that_does_not_fit(
    change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
    words: list[str],
    make_tiny_denoiser: MakeDenoiser,
    tmp_path: Path,
):
    path = tmp_path / "prompts.safetensors"
    save_file(dict(change(make_prompts(make_tiny_denoiser("sd3"), num=2, num_tokens=7))), path)
    with pytest.raises(CheckpointError) as caught:
        make_tiny_denoiser("sd3", conditioning=str(path))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in ["prompts.safetensors", *words]), caught.value


def test_conditioning_file_that_is_missing(make_tiny_denoiser: MakeDenoiser, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"none\.safetensors: cannot be read"):
        make_tiny_denoiser("sd3", conditioning=str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize(
    ("family", "section", "words"),
    [
        ("dit", {"conditioning": "prompts.safetensors"}, ["model.conditioning", "class labels"]),
        ("dit", {"num_text_tokens": 9}, ["model.num_text_tokens: received 9", "class labels"]),
        (
            "sd3",
            {"conditioning": "prompts.safetensors", "num_text_tokens": 9},
            ["model.num_text_tokens: received 9", "have 7", "the file decides"],
        ),
    ],
)
def test_text_that_would_be_ignored_is_refused(
    family: str,
    section: dict[str, Any],
    words: list[str],
    make_tiny_denoiser: MakeDenoiser,
    tmp_path: Path,
):
    path = tmp_path / "prompts.safetensors"
    save_file(make_prompts(make_tiny_denoiser("sd3"), num=2, num_tokens=7), path)
    if "conditioning" in section:
        section = section | {"conditioning": str(path)}
    with pytest.raises(RecipeError) as caught:
        make_tiny_denoiser(family, **section)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_number_of_tokens_that_the_file_has_is_fine(
    make_tiny_denoiser: MakeDenoiser, tmp_path: Path
):
    path = tmp_path / "prompts.safetensors"
    save_file(make_prompts(make_tiny_denoiser("sd3"), num=2, num_tokens=7), path)
    denoiser = make_tiny_denoiser("sd3", conditioning=str(path), num_text_tokens=7)
    assert denoiser.row_shapes["encoder_hidden_states"][0] == 7


def test_the_default_that_earlier_versions_wrote_is_no_setting(
    make_tiny_denoiser: MakeDenoiser, tmp_path: Path
):
    path = tmp_path / "prompts.safetensors"
    save_file(make_prompts(make_tiny_denoiser("sd3"), num=2, num_tokens=7), path)
    denoiser = make_tiny_denoiser("sd3", conditioning=str(path), num_text_tokens=16)
    assert denoiser.row_shapes["encoder_hidden_states"][0] == 7
    assert make_tiny_denoiser("dit", num_text_tokens=16).input_names[-1] == "class_labels"


@pytest.mark.parametrize("masked", [0, 5])
def test_pixart_has_plain_attention_for_export_only(
    masked: int, make_tiny_denoiser: MakeDenoiser, monkeypatch: pytest.MonkeyPatch
):
    denoiser = make_tiny_denoiser("pixart")
    inputs = denoiser.make_example_inputs(2, seed=0)
    inputs["encoder_attention_mask"][:, :masked] = 0
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def count(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    expected = denoiser(*inputs.values())
    assert len(calls) == 4  # self and cross attention of two blocks
    with denoiser.exportable():
        plain = denoiser(*inputs.values())
    assert len(calls) == 4
    assert (plain - expected).abs().max() < 1e-5 * expected.abs().max()
    with pytest.raises(ZeroDivisionError), denoiser.exportable():
        raise ZeroDivisionError
    assert torch.equal(denoiser(*inputs.values()), expected)
    assert len(calls) == 8


def drop_illegal_squeezes(model: ir.Model) -> int:
    """Make Squeeze nodes on axes longer than 1 an Identity, which is what PyTorch means by them."""
    dropped = 0
    for node in model.graph:
        if node.op_type != "Squeeze" or len(node.inputs) != 2:
            continue
        source, axes = node.inputs[0], ir.convenience.get_const_tensor(node.inputs[1])
        lengths = [source.shape[int(axis)] for axis in axes.numpy().ravel()]
        if any(isinstance(length, int) and length != 1 for length in lengths):
            node.op_type = "Identity"
            node.resize_inputs(1)
            dropped += 1
    return dropped


SLOW = pytest.mark.slow


# torch 2.13 warns of its own deprecated LeafSpec, and of one name for the batch of all inputs.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:# The axis name. batch will not be used:UserWarning")
@pytest.mark.parametrize(
    "family", ["dit", *(pytest.param(name, marks=SLOW) for name in ("sd3", "pixart", "flux"))]
)
def test_export_agrees_with_torch_at_any_batch(
    family: str, make_tiny_denoiser: MakeDenoiser, tmp_path: Path
):
    denoiser = make_tiny_denoiser(family)
    inputs = denoiser.make_example_inputs(2, seed=0)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad(), denoiser.exportable():
        program = torch.onnx.export(
            denoiser,
            tuple(inputs.values()),
            dynamo=True,
            opset_version=21,
            input_names=list(inputs),
            output_names=["output"],
            dynamic_shapes=(tuple({0: batch} for _ in inputs),),
            verbose=False,
        )
    assert program is not None
    assert drop_illegal_squeezes(program.model) == (family == "pixart")
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    assert tuple(value.name for value in session.get_inputs()) == denoiser.input_names
    for size in (1, 3):
        inputs = denoiser.make_example_inputs(size, seed=size)
        feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
        (output,) = session.run(None, feeds)
        assert np.abs(output - denoiser(*inputs.values()).numpy()).max() < 1e-4


def test_digits_checkpoint_is_a_denoiser(digits_checkpoint: Path):
    checkpoint = open_checkpoint(digits_checkpoint)
    section = ModelSection(checkpoint=str(digits_checkpoint))
    denoiser = make_denoiser(load_model(checkpoint), checkpoint, section)
    assert denoiser.sample_shape == (1, 8, 8)
    assert denoiser.null_conditioning(1)["class_labels"].tolist() == [10]
    assert denoiser(*denoiser.make_example_inputs(2, seed=0).values()).shape == (2, 1, 8, 8)
