"""Calibrate: statistics against a direct computation, determinism, what the branch is good for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from treeq_export import api
from treeq_export.calibrate import run_calibrate
from treeq_export.model.fit import LayerTokens, fit_layer, quantize_layer
from treeq_export.model.qlinear import QLinear
from treeq_export.model.quantized import layer_tensors, linear_of, quantize_model
from treeq_export.model.sampler import sample
from treeq_export.model.statistics import InputStatistics, collect_statistics
from treeq_export.model.trajectories import collect_rows, predict
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import LayerPlan, TreePath, load_plan, load_tensors
from treeq_export.quant.branch import dense_branch
from treeq_export.quant.grids import INTEGER
from treeq_export.quant.metrics import sqnr_db
from treeq_export.quant.numerics import dequantize_weight
from treeq_export.quant.rotation import rotate
from treeq_export.quant.scales import fit_tensor_scale
from treeq_export.quant.spec import ActivationFormat, BranchFormat, WeightFormat
from treeq_export.recipe import CalibrateSection
from treeq_export.run_folder import RunFolder

Make = Callable[..., Any]
NEAREST = CalibrateSection(
    rounding="nearest", num_clip_steps=20, inputs="full_precision", bias_correction=False
)


def capture_inputs(tiny: Any, seed: int) -> dict[str, list[np.ndarray]]:
    """Sample as calibrate does and keep every planned layer's inputs, one array a call."""
    captured: dict[str, list[np.ndarray]] = {layer.name: [] for layer in tiny.plan.layers}
    handles = []
    for layer in tiny.plan.layers:

        def hook(_: nn.Module, inputs: tuple[Any, ...], name: str = layer.name) -> None:
            captured[name].append(inputs[0].numpy().reshape(-1, inputs[0].shape[-1]).copy())

        handles.append(linear_of(tiny.denoiser, layer).register_forward_pre_hook(hook))

    def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return tiny.denoiser(*(inputs[name] for name in tiny.denoiser.input_names))

    num = tiny.recipe.calibrate.num_samples
    sample(run, tiny.denoiser, tiny.recipe.sampler, num=num, seed=seed)
    for handle in handles:
        handle.remove()
    return captured


def read_statistics(run: Path) -> dict[str, Any]:
    return json.loads((run / RunFolder.CALIBRATION).read_text())


def calibrate(tiny: Any, run: Path, **recipe: Any) -> bytes:
    """Calibrate into a new folder and return the bytes of plan.safetensors."""
    run.mkdir()
    changed = tiny.recipe.model_copy(update=recipe)
    run_calibrate(run, tiny.denoiser, tiny.plan, changed, lambda _: None)
    return (run / RunFolder.TENSORS).read_bytes()


@pytest.fixture(scope="module")
def static_run(make_tiny_run: Make) -> Any:
    """The tiny DiT with static activation scales, a branch and groups."""
    tiny = make_tiny_run("dit", activation_scale="tensor_static", group_size=32)
    run_calibrate(tiny.run, tiny.denoiser, tiny.plan, tiny.recipe, lambda _: None)
    return tiny


def test_statistics_are_those_of_the_rotated_inputs(static_run: Any):
    captured = capture_inputs(static_run, static_run.recipe.seed)
    written = read_statistics(static_run.run)
    assert written["conditioning"] == "labels"
    assert (written["num_samples"], written["seed"]) == (3, 0)
    assert list(written["layers"]) == [layer.name for layer in static_run.plan.layers]
    for layer in static_run.plan.layers:
        tokens = np.concatenate(captured[layer.name]).astype(np.float64)
        rotated = rotate(tokens, layer.rotation_group)
        mean_square = np.mean(rotated**2, axis=1)
        expected = {
            "num_tokens": len(tokens),
            "rms": float(np.sqrt(np.mean(rotated**2))),
            "absmax": float(np.abs(rotated).max()),
            "kurtosis": float(np.mean(np.mean(rotated**4, axis=1) / mean_square**2)),
        }
        assert written["layers"][layer.name] == pytest.approx(expected, rel=1e-4)
    # 3 samples in 2 steps; 16 image tokens each, or one row of conditioning.
    tokens = {layer["num_tokens"] for layer in written["layers"].values()}
    assert tokens == {3 * 2, 3 * 2 * 16}


def test_static_scale_is_fitted_to_the_kept_tokens(static_run: Any):
    recipe = static_run.recipe
    statistics = collect_statistics(
        static_run.denoiser, static_run.plan.layers, recipe, lambda _: None
    )
    for layer in static_run.plan.layers:
        kept = np.concatenate(statistics[layer.name].kept)
        assert 0 < len(kept) <= recipe.calibrate.max_tokens
        step = fit_tensor_scale(kept, 4, recipe.calibrate.num_clip_steps)
        written = static_run.tensors[f"{layer.name}.activation_step"]
        assert written.dtype == np.float32
        assert written == pytest.approx(step, rel=1e-6)
        # Below the full range, above nothing: clipping is used, and the scale is of this layer.
        assert 0.2 * np.abs(kept).max() / 7 < step <= np.abs(kept).max() / 7
    steps = {
        float(static_run.tensors[f"{layer.name}.activation_step"][0])
        for layer in static_run.plan.layers
    }
    assert len(steps) > 5


def test_kept_tokens_are_spread_over_the_trajectory(make_tiny_run: Make):
    tiny = make_tiny_run("dit")
    section = tiny.recipe.calibrate.model_copy(update={"num_samples": 4, "max_tokens": 12})
    sampler = tiny.recipe.sampler.model_copy(update={"steps": 3, "batch_size": 2})
    recipe = tiny.recipe.model_copy(update={"calibrate": section, "sampler": sampler})
    steps: list[float] = []
    statistics = collect_statistics(tiny.denoiser, tiny.plan.layers, recipe, steps.append)
    for entry in statistics.values():
        # 2 batches of 3 steps: 6 calls, 2 tokens of each.
        assert [len(tokens) for tokens in entry.kept] == [2] * 6
        assert entry.num_kept == 12
    assert steps == sorted(steps)
    assert steps[-1] == 1.0


def test_hooks_are_gone_afterwards(static_run: Any):
    for layer in static_run.plan.layers:
        assert not linear_of(static_run.denoiser, layer)._forward_pre_hooks


def test_hooks_are_gone_after_a_failure(
    make_tiny_denoiser: Callable[..., Denoiser], static_run: Any, monkeypatch: pytest.MonkeyPatch
):
    denoiser = make_tiny_denoiser("dit")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("treeq_export.model.statistics.sample", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        collect_statistics(denoiser, static_run.plan.layers, static_run.recipe, lambda _: None)
    for layer in static_run.plan.layers:
        assert not linear_of(denoiser, layer)._forward_pre_hooks


def test_same_seed_same_bytes(static_run: Any, tmp_path: Path):
    first = calibrate(static_run, tmp_path / "a")
    assert calibrate(static_run, tmp_path / "b") == first
    assert (static_run.run / RunFolder.TENSORS).read_bytes() == first
    for file in (RunFolder.PLAN, RunFolder.CALIBRATION):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_seed_moves_static_scales_and_statistics_only(static_run: Any, tmp_path: Path):
    calibrate(static_run, tmp_path / "other", seed=1)
    other = load_tensors(tmp_path / "other", load_plan(tmp_path / "other"))
    assert other.keys() == static_run.tensors.keys()
    moved = [name for name in other if not np.array_equal(other[name], static_run.tensors[name])]
    assert moved
    assert {name.rpartition(".")[2] for name in moved} == {"activation_step"}
    statistics = read_statistics(tmp_path / "other")
    assert statistics["seed"] == 1
    assert statistics["layers"] != read_statistics(static_run.run)["layers"]


def test_seed_moves_no_tensor_of_token_scales(compiled_dit: Any, tmp_path: Path):
    """Codes and steps of token scales come from the weights alone."""
    written = (compiled_dit.run / RunFolder.TENSORS).read_bytes()
    assert calibrate(compiled_dit, tmp_path / "other", seed=1) == written
    for layer in compiled_dit.plan.layers:
        step = compiled_dit.tensors[f"{layer.name}.activation_step"]
        assert step == np.float32(INTEGER.gaussian_step[4])


def test_tensors_have_the_plan_s_shapes(static_run: Any):
    plan = load_plan(static_run.run, static_run.checkpoint.sha256)
    assert plan.tensors_sha256 is not None
    tensors = load_tensors(static_run.run, plan)
    qmin, qmax = INTEGER.ends(4)
    for layer in plan.layers:
        codes = tensors[f"{layer.name}.codes"]
        assert codes.dtype == np.int8
        assert qmin <= codes.min() < codes.max() <= qmax
        scale = tensors[f"{layer.name}.weight_scale"]
        assert scale.shape == (layer.out_features, layer.in_features // 32)
        assert (scale > 0).all()
    assert len(tensors) == 5 * len(plan.layers)


def test_tensors_rebuild_the_weight(static_run: Any):
    for layer in static_run.plan.layers:
        short = {
            name: static_run.tensors[f"{layer.name}.{name}"]
            for name in ("codes", "weight_scale", "branch.R", "branch.L")
        }
        residual = rotate(
            dequantize_weight(short["codes"], short["weight_scale"]), layer.rotation_group
        )
        rebuilt = dense_branch(short["branch.R"], short["branch.L"]) + residual
        weight = linear_of(static_run.denoiser, layer).weight.detach().numpy()
        # 4 bits of a Gaussian have 20.2 dB; the branch takes nothing away.
        assert sqnr_db(weight, rebuilt) > 19


def test_steps_rise_to_one(static_run: Any, tmp_path: Path):
    steps: list[float] = []
    run_calibrate(tmp_path, static_run.denoiser, static_run.plan, static_run.recipe, steps.append)
    assert steps == sorted(steps)
    assert steps[-1] == pytest.approx(1.0)
    assert any(step <= 0.7 for step in steps)


def make_layer_plan(branch: BranchFormat | None, scale: str = "token_rms") -> LayerPlan:
    bits = None if scale == "none" else 3
    return LayerPlan(
        name="blocks.0.fc",
        in_features=64,
        out_features=96,
        tree=TreePath(block=0, position="fc", leaf=0),
        weight=WeightFormat(bits=3),
        activation=ActivationFormat.model_validate({"bits": bits, "scale": scale}),
        rotation_group=16,
        branch=branch,
    )


def rebuild(layer: LayerPlan, tensors: dict[str, Any]) -> np.ndarray:
    weight = rotate(
        dequantize_weight(tensors["codes"], tensors["weight_scale"]), layer.rotation_group
    )
    if layer.branch is not None:
        weight = weight + dense_branch(tensors["branch.R"], tensors["branch.L"])
    return weight


def test_branch_takes_the_low_rank_part():
    """Low rank plus noise a tenth as strong: with the branch only the noise is quantized."""
    rng = np.random.default_rng(0)
    low = rng.standard_normal((96, 4)) @ rng.standard_normal((4, 64)) / 2
    weight = (low + 0.1 * rng.standard_normal((96, 64))).astype(np.float32)
    error = {}
    for rank in (None, 2, 4, 8):
        branch = None if rank is None else BranchFormat(b_in=1, b_out=1, rank=rank)
        layer = make_layer_plan(branch)
        tensors = quantize_layer(layer, weight, InputStatistics(), NEAREST)
        error[rank] = float(np.linalg.norm(weight - rebuild(layer, tensors)))
    assert error[8] < error[4] < error[2] < error[None]
    assert error[4] < 0.2 * error[None]


def test_grid_branch_takes_the_block_part():
    """Blocks of rank one each: a 2 x 2 grid of rank 1 holds them, plain rank 1 does not."""
    rng = np.random.default_rng(0)
    blocks = [
        [np.outer(rng.standard_normal(48), rng.standard_normal(32)) for _ in range(2)]
        for _ in range(2)
    ]
    weight = (np.block(blocks) + 0.05 * rng.standard_normal((96, 64))).astype(np.float32)
    error = []
    for grid in (2, 1):
        layer = make_layer_plan(BranchFormat(b_in=grid, b_out=grid, rank=1))
        tensors = quantize_layer(layer, weight, InputStatistics(), NEAREST)
        error.append(float(np.linalg.norm(weight - rebuild(layer, tensors))))
    assert error[0] < 0.2 * error[1]


def test_tensors_are_those_the_formats_need():
    weight = np.random.default_rng(0).standard_normal((96, 64)).astype(np.float32)
    plain = quantize_layer(make_layer_plan(None), weight, InputStatistics(), NEAREST)
    assert set(plain) == {"codes", "weight_scale", "activation_step"}
    only = quantize_layer(make_layer_plan(None, "none"), weight, InputStatistics(), NEAREST)
    assert set(only) == {"codes", "weight_scale"}
    branch = BranchFormat(b_in=2, b_out=3, rank=2)
    full = quantize_layer(make_layer_plan(branch), weight, InputStatistics(), NEAREST)
    assert set(full) == {*plain, "branch.R", "branch.L"}


def test_statistics_of_given_tokens():
    statistics = InputStatistics()
    rng = np.random.default_rng(0)
    statistics.add(np.array([[3.0, -4.0], [0.0, 1.0]], np.float32), 1, rng)
    statistics.add(np.array([[0.0, 0.0]], np.float32), 2, rng)
    statistics.add(np.full((5, 2), 2.0, np.float32), 0, rng)
    summary = statistics.summary()
    assert summary["num_tokens"] == 8
    assert summary["absmax"] == 4.0
    assert summary["rms"] == pytest.approx(np.sqrt((12.5 + 0.5 + 0 + 5 * 4) / 8))
    # Kurtosis of (3, -4): mean(81, 256) / 12.5^2; of (0, 1): 2; of zeros: 0; of equal values: 1.
    assert summary["kurtosis"] == pytest.approx((168.5 / 156.25 + 2 + 0 + 5) / 8)
    first, second = (tokens.tolist() for tokens in statistics.kept)
    assert first in ([[3.0, -4.0]], [[0.0, 1.0]])
    assert second == [[0.0, 0.0]]
    assert statistics.num_kept == 2
    assert InputStatistics().summary() == {
        "num_tokens": 0,
        "rms": 0.0,
        "absmax": 0.0,
        "kurtosis": 0.0,
    }


def test_kept_tokens_are_drawn_from_every_place_of_an_image():
    places = np.tile(np.arange(16, dtype=np.float32), 64)[:, None]  # 64 images of 16 tokens
    statistics = InputStatistics()
    statistics.add(places, 256, np.random.default_rng(0))
    assert len(np.unique(statistics.kept[0])) == 16
    thinned = statistics.thin(64, seed=0)
    assert thinned.num_kept == len(thinned.kept[0]) == 64
    assert len(np.unique(thinned.kept[0])) > 8
    assert statistics.thin(256, seed=0) is statistics


def test_gptq_lowers_the_output_error_of_every_layer(compiled_dit: Any, tmp_path: Path):
    section = compiled_dit.recipe.calibrate.model_copy(update={"rounding": "gptq"})
    calibrate(compiled_dit, tmp_path / "gptq", calibrate=section)
    tensors = load_tensors(tmp_path / "gptq", load_plan(tmp_path / "gptq"))
    captured = capture_inputs(compiled_dit, compiled_dit.recipe.seed)
    for layer in compiled_dit.plan.layers:
        weight = linear_of(compiled_dit.denoiser, layer).weight.detach().numpy()
        x = np.concatenate(captured[layer.name])
        error = {}
        for kind, source in (("nearest", compiled_dit.tensors), ("gptq", tensors)):
            short = layer_tensors(source, layer.name)
            error[kind] = float(np.linalg.norm(x @ (weight - rebuild(layer, short)).T))
        assert error["gptq"] < error["nearest"], layer.name
        scales = [
            source[f"{layer.name}.weight_scale"] for source in (compiled_dit.tensors, tensors)
        ]
        assert np.array_equal(*scales)


def test_gptq_is_deterministic(compiled_dit: Any, tmp_path: Path):
    section = compiled_dit.recipe.calibrate.model_copy(update={"rounding": "gptq"})
    first = calibrate(compiled_dit, tmp_path / "a", calibrate=section)
    assert calibrate(compiled_dit, tmp_path / "b", calibrate=section) == first


def fit_noisy(section: CalibrateSection, clean: np.ndarray, quantized: np.ndarray) -> float:
    """Return the relative output error of a 3-bit layer that meets `quantized`, on these tokens."""
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((96, 64)).astype(np.float32)
    bias = rng.standard_normal(96).astype(np.float32)
    layer = make_layer_plan(BranchFormat(b_in=1, b_out=1, rank=4))
    tensors = fit_layer(layer, weight, bias, LayerTokens(clean, quantized), section).tensors
    module = QLinear(layer, tensors, torch.from_numpy(bias))
    reached = module(torch.from_numpy(quantized)).detach().numpy()
    expected = clean @ weight.T + bias
    return float(np.linalg.norm(reached - expected) / np.linalg.norm(expected))


def make_tokens() -> tuple[np.ndarray, np.ndarray]:
    """Return clean tokens with a mean, and what a wrong gain, noise and an offset leave of them."""
    rng = np.random.default_rng(2)
    mixing = rng.standard_normal((64, 64)) * np.geomspace(1, 0.1, 64)[:, None]
    clean = rng.standard_normal((2000, 64)) @ mixing + rng.standard_normal(64)
    quantized = 0.8 * clean + 0.3 * rng.standard_normal(clean.shape) + 0.2
    return clean.astype(np.float32), quantized.astype(np.float32)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_each_calibration_option_lowers_the_output_error(rounding: Any):
    clean, quantized = make_tokens()
    plain = CalibrateSection(
        rounding=rounding, inputs="full_precision", bias_correction=False, step="gaussian"
    )
    corrected = plain.model_copy(update={"bias_correction": True})
    ordered = corrected.model_copy(update={"inputs": "quantized"})
    fitted = ordered.model_copy(update={"step": "fitted"})
    errors = [fit_noisy(s, clean, quantized) for s in (plain, corrected, ordered, fitted)]
    assert errors[1] < 0.98 * errors[0]
    assert errors[2] < 0.9 * errors[1]
    assert errors[3] < 1.001 * errors[2]


def test_a_fitted_step_beats_the_gaussian_one_on_tokens_that_are_not_gaussian():
    rng = np.random.default_rng(0)
    clean = rng.choice([-1.0, 1.0], (500, 64)).astype(np.float32) * rng.uniform(0.9, 1.1, (500, 64))
    clean = rotate(clean.astype(np.float32), 16)  # two-valued after the layer's rotation
    gaussian = CalibrateSection(step="gaussian", inputs="full_precision")
    fitted = CalibrateSection(step="fitted", inputs="full_precision")
    assert fit_noisy(fitted, clean, clean) < 0.8 * fit_noisy(gaussian, clean, clean)


def test_bias_correction_closes_the_mean_error():
    clean, quantized = make_tokens()
    weight = np.random.default_rng(3).standard_normal((96, 64)).astype(np.float32)
    layer = make_layer_plan(None)
    section = CalibrateSection(bias_correction=True)
    tensors = fit_layer(layer, weight, None, LayerTokens(clean, quantized), section).tensors
    module = QLinear(layer, tensors, None)
    reached = module(torch.from_numpy(quantized)).detach().numpy()
    missed = (clean @ weight.T - reached).mean(axis=0)
    assert np.abs(missed).max() < 1e-3 * np.abs(clean @ weight.T).mean()


def test_the_clean_error_is_made_up_for_without_quantized_activations():
    """Weight-only layers are fitted to the changed inputs too."""
    clean, quantized = make_tokens()
    weight = np.random.default_rng(3).standard_normal((96, 64)).astype(np.float32)
    layer = make_layer_plan(None, "none")
    fitted = fit_layer(layer, weight, None, LayerTokens(clean, quantized), CalibrateSection())
    assert set(fitted.tensors) == {"codes", "weight_scale", "bias"}
    rounded = rebuild(layer, fitted.tensors)
    # Scales of least error shrink a weight; this one has grown, as its tokens have shrunk.
    assert np.vdot(rounded, weight) > np.vdot(weight, weight)


@pytest.mark.parametrize("family", ["dit", "pixart", "sd3", "flux"])
def test_calibration_in_order_lowers_the_network_s_error(family: str, make_tiny_run: Make):
    tiny = make_tiny_run(family, weight_bits=3, activation_bits=3)
    section = tiny.recipe.calibrate.model_copy(
        update={
            "inputs": "quantized",
            "bias_correction": True,
            "rounding": "gptq",
            "num_samples": 16,
            "max_tokens": 2048,
        }
    )
    sampler = tiny.recipe.sampler.model_copy(update={"steps": 4, "batch_size": 16})
    recipe = tiny.recipe.model_copy(update={"calibrate": section, "sampler": sampler})
    steps: list[float] = []
    model = api.Model(tiny.denoiser, tiny.checkpoint, recipe)
    made = api.calibrate(api.Quantized(model, tiny.plan, {}), on_step=steps.append)
    assert steps == sorted(steps)
    assert steps[-1] == pytest.approx(1.0)
    rows = collect_rows(tiny.denoiser, sampler, num_samples=4, num_rows=None, seed=9)
    reference = predict(tiny.denoiser, rows, 8)
    error = []
    for tensors in (tiny.tensors, made.tensors):
        quantized = quantize_model(tiny.denoiser, tiny.plan, tensors)
        error.append(float(torch.mean((predict(quantized, rows, 8) - reference) ** 2)))
    assert error[1] < 0.9 * error[0]
    for layer in made.plan.layers:
        linear = linear_of(tiny.denoiser, layer)
        assert not linear._forward_pre_hooks


def test_calibration_in_order_is_deterministic(compiled_dit: Any, tmp_path: Path):
    section = compiled_dit.recipe.calibrate.model_copy(
        update={"inputs": "quantized", "rounding": "gptq", "max_tokens": 24}
    )
    first = calibrate(compiled_dit, tmp_path / "a", calibrate=section)
    assert calibrate(compiled_dit, tmp_path / "b", calibrate=section) == first
    assert calibrate(compiled_dit, tmp_path / "c", calibrate=section, seed=1) != first


def test_trained_rounding_needs_quantized_inputs():
    with pytest.raises(ValueError, match="rounding 'adaround' needs inputs 'quantized'"):
        CalibrateSection(rounding="adaround", inputs="full_precision")
