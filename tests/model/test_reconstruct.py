"""Learned rounding: what a soft layer computes, what training gains, what it leaves alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from treeq_export import api
from treeq_export.model.qlinear import QLinear
from treeq_export.model.quantized import layer_tensors, linear_of, quantize_model
from treeq_export.model.reconstruct import BlockCall, SoftLinear, reconstruct_block
from treeq_export.model.trajectories import collect_rows, predict
from treeq_export.quant.branch import dense_branch
from treeq_export.quant.grids import INTEGER
from treeq_export.quant.rotation import rotate
from treeq_export.recipe import Recipe

BLOCK = "transformer_blocks.0"


@pytest.fixture(scope="module")
def tiny(make_tiny_run: Callable[..., Any]) -> Any:
    """A tiny DiT at 3 bits, rounded to nearest."""
    return make_tiny_run("dit", weight_bits=3, activation_bits=3)


def make_soft(tiny: Any, index: int = 0) -> tuple[QLinear, SoftLinear, np.ndarray]:
    """Return a layer, its soft form, and the real codes that this starts from."""
    entry = tiny.plan.layers[index]
    tensors = layer_tensors(tiny.tensors, entry.name)
    layer = QLinear(entry, tensors, linear_of(tiny.denoiser, entry).bias)
    noise = np.random.default_rng(0).uniform(-0.49, 0.49, tensors["codes"].shape)
    real = (tensors["codes"] + noise).astype(np.float32)
    return layer, SoftLinear(layer, real), real


def test_a_soft_layer_starts_between_the_codes_and_the_real_values(tiny: Any):
    layer, soft, real = make_soft(tiny)
    start = soft.codes().detach().numpy()
    qmin, qmax = INTEGER.ends(3)
    inside = (layer.codes > qmin) & (layer.codes < qmax)
    middle = 0.5 * (layer.codes + real)
    assert np.abs(start - middle)[inside].max() <= 0.021
    assert (np.rint(start) == layer.codes).all()


def test_an_untrained_soft_layer_hardens_to_the_layer(tiny: Any):
    layer, soft, _ = make_soft(tiny)
    soft.harden()
    tensors = soft.tensors()
    assert np.array_equal(tensors["codes"], layer.codes)
    again = QLinear(layer.layer, tensors, None)
    x = torch.randn(4, layer.layer.in_features, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(soft(x), layer(x), atol=1e-5)
    assert torch.allclose(again(x), layer(x), atol=1e-6)


def test_layers_without_quantized_activations_branch_or_bias_train_too(tiny: Any):
    entry = (
        tiny.plan.layers[0]
        .model_copy(
            update={"activation": type(tiny.plan.layers[0].activation)(bits=None, scale="none")}
        )
        .model_copy(update={"branch": None})
    )
    tensors = layer_tensors(tiny.tensors, entry.name)
    short = {name: tensors[name] for name in ("codes", "weight_scale")}
    layer = QLinear(entry, short, None)
    soft = SoftLinear(layer, tensors["codes"].astype(np.float32))
    soft.harden()
    assert set(soft.tensors()) == {"codes", "weight_scale", "bias"}
    x = torch.randn(4, entry.in_features, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(soft(x), layer(x), atol=1e-5)


def record_calls(tiny: Any, num_calls: int) -> list[BlockCall]:
    """Return calls of the first block in full precision."""
    calls: list[BlockCall] = []
    block = tiny.denoiser.model.get_submodule(BLOCK)

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        calls.append(BlockCall(args, dict(kwargs), (output,)))

    handle = block.register_forward_hook(hook, with_kwargs=True)
    for seed in range(num_calls):
        predict(tiny.denoiser, tiny.denoiser.make_example_inputs(8, seed=seed), 8)
    handle.remove()
    return calls


def block_error(denoiser: Any, calls: list[BlockCall]) -> float:
    block = denoiser.model.get_submodule(BLOCK)
    with torch.no_grad():
        errors = [
            torch.mean((block(*call.args, **call.kwargs) - call.target[0]) ** 2) for call in calls
        ]
    return float(torch.stack(errors).mean())


def real_codes_of(tiny: Any, layer: Any) -> np.ndarray:
    """Return the residual weight in units of its scale, as it was before it was rounded."""
    short = layer_tensors(tiny.tensors, layer.name)
    weight = linear_of(tiny.denoiser, layer).weight.detach().numpy()
    residual = weight - dense_branch(short["branch.R"], short["branch.L"])
    return rotate(residual, layer.rotation_group) / short["weight_scale"]


def reconstruct(tiny: Any, calls: list[BlockCall], num_steps: int) -> tuple[Any, dict[str, Any]]:
    quantized = quantize_model(tiny.denoiser, tiny.plan, tiny.tensors)
    real_codes = {
        layer.name: real_codes_of(tiny, layer)
        for layer in tiny.plan.layers
        if layer.name.startswith(BLOCK)
    }
    new = reconstruct_block(quantized, BLOCK, real_codes, calls, num_steps=num_steps, seed=0)
    return quantized, new


def test_training_lowers_the_block_s_error_and_changes_codes(tiny: Any):
    calls = record_calls(tiny, 6)
    before = block_error(quantize_model(tiny.denoiser, tiny.plan, tiny.tensors), calls)
    quantized, new = reconstruct(tiny, calls, 150)
    assert block_error(quantized, calls) < 0.5 * before
    assert len(new) == sum(layer.name.startswith(BLOCK) for layer in tiny.plan.layers)
    qmin, qmax = INTEGER.ends(3)
    num_changed = 0
    for name, tensors in new.items():
        codes = tensors["codes"]
        assert codes.dtype == np.int8
        assert qmin <= codes.min() < codes.max() <= qmax
        changed = np.abs(codes - tiny.tensors[f"{name}.codes"])
        assert changed.max() <= 1
        num_changed += int(changed.sum())
        module = quantized.model.get_submodule(name)
        assert isinstance(module, QLinear)
        assert np.array_equal(module.codes, codes)
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert num_changed > 0
    again = reconstruct(tiny, calls, 150)[1]
    for name, tensors in new.items():
        assert all(np.array_equal(again[name][key], value) for key, value in tensors.items())


def test_training_that_does_not_help_leaves_the_block_as_it_was(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("treeq_export.model.reconstruct._CHOICE_TRAVEL", 0.0)
    monkeypatch.setattr("treeq_export.model.reconstruct._OTHER_RATE", 1.0)
    calls = record_calls(tiny, 2)
    quantized, new = reconstruct(tiny, calls, 3)
    assert new == {}
    untouched = quantize_model(tiny.denoiser, tiny.plan, tiny.tensors)
    assert block_error(quantized, calls) == block_error(untouched, calls)


@pytest.mark.parametrize("family", ["dit", "flux"])
def test_calibrate_trains_block_by_block(family: str, make_tiny_run: Callable[..., Any]):
    tiny = make_tiny_run(family, weight_bits=3, activation_bits=3)
    error = {}
    for rounding in ("gptq", "adaround"):
        update = {
            "inputs": "quantized",
            "bias_correction": True,
            "rounding": rounding,
            "reconstruct_steps": 60,
            "num_samples": 16,
            "max_tokens": 1024,
        }
        section = tiny.recipe.calibrate.model_copy(update=update)
        sampler = tiny.recipe.sampler.model_copy(update={"steps": 4, "batch_size": 16})
        recipe: Recipe = tiny.recipe.model_copy(update={"calibrate": section, "sampler": sampler})
        steps: list[float] = []
        model = api.Model(tiny.denoiser, tiny.checkpoint, recipe)
        quantized = api.calibrate(
            api.Quantized(model, tiny.plan, {}), on_step=steps.append
        ).denoiser
        assert steps == sorted(steps)
        rows = collect_rows(tiny.denoiser, sampler, num_samples=8, num_rows=None, seed=9)
        difference = predict(quantized, rows, 16) - predict(tiny.denoiser, rows, 16)
        error[rounding] = float(torch.mean(difference**2))
    assert error["adaround"] < error["gptq"]
