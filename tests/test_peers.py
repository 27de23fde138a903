"""Peers: each quantizes exactly the layers that it is told to, about as well as its bits allow."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from treeq_export.errors import RecipeError, RunnerError
from treeq_export.model.trajectories import Rows, collect_rows, predict
from treeq_export.model.zoo import Denoiser
from treeq_export.peers import PEERS, enabled_quantizers, quantize_with_peer
from treeq_export.quant.metrics import sqnr_db
from treeq_export.recipe import SamplerSection

LAYERS = [
    "transformer_blocks.0.attn1.to_q",
    "transformer_blocks.0.norm1.linear",
    "transformer_blocks.1.ff.net.2",
]


@pytest.fixture(scope="module")
def denoiser(make_tiny_denoiser: Callable[..., Denoiser]) -> Denoiser:
    return make_tiny_denoiser("dit")


@pytest.fixture(scope="module")
def rows(denoiser: Denoiser) -> Rows:
    section = SamplerSection(steps=2, batch_size=4)
    return collect_rows(denoiser, section, num_samples=4, num_rows=None, seed=0)


@pytest.mark.parametrize(
    ("name", "kinds", "least_db", "most_db"),
    [
        ("modelopt_int8_max", ["input_quantizer", "weight_quantizer"], 35, 70),
        ("modelopt_svdquant_w4a4", ["input_quantizer", "weight_quantizer"], 15, 45),
        ("modelopt_awq_w4", ["weight_quantizer"], 15, 45),
    ],
)
def test_a_peer_quantizes_exactly_these_layers(
    name: str,
    kinds: list[str],
    least_db: float,
    most_db: float,
    denoiser: Denoiser,
    rows: Rows,
    capsys: pytest.CaptureFixture[str],
):
    before = {key: tensor.clone() for key, tensor in denoiser.state_dict().items()}
    reference = predict(denoiser, rows, 8)
    quantized = quantize_with_peer(name, denoiser, LAYERS, rows)
    assert enabled_quantizers(quantized) == dict.fromkeys(sorted(LAYERS, key=order), kinds)
    assert least_db < sqnr_db(reference, predict(quantized, rows, 8)) < most_db
    assert not quantized.training
    assert capsys.readouterr().out == ""
    after = denoiser.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(predict(denoiser, rows, 8), reference)


def order(layer: str) -> tuple[str, bool]:
    """Sort as the modules stand in the model: norm1 before attn1."""
    return layer.split(".")[1], "norm1" not in layer


def test_a_scale_per_token_is_that_token_s(denoiser: Denoiser, rows: Rows):
    quantized = quantize_with_peer("modelopt_svdquant_w4a4", denoiser, LAYERS, rows)
    quantizer: Any = quantized.model.get_submodule(f"{LAYERS[0]}.input_quantizer")
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    whole = quantizer(x)
    louder = torch.cat([x[:1], 100 * x[1:]])
    assert torch.equal(quantizer(louder)[:1], whole[:1])
    assert torch.equal(quantizer(x[:1]), whole[:1])
    assert not torch.equal(whole, x)


def test_an_unknown_peer_lists_the_known_ones(denoiser: Denoiser, rows: Rows):
    with pytest.raises(RecipeError, match="modelopt_w2: no such peer") as caught:
        quantize_with_peer("modelopt_w2", denoiser, LAYERS, rows)
    assert all(name in str(caught.value) for name in PEERS)


def test_a_missing_package_says_what_to_install(
    denoiser: Denoiser, rows: Rows, monkeypatch: pytest.MonkeyPatch
):
    def fail(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(RunnerError, match=r"pip install 'treeq-export\[modelopt\]'"):
        quantize_with_peer("modelopt_int8_max", denoiser, LAYERS, rows)


def test_a_layer_that_was_not_quantized_is_named(denoiser: Denoiser, rows: Rows):
    layers = [*LAYERS, "transformer_blocks.7.ff.net.2"]
    with pytest.raises(RunnerError, match=r"transformer_blocks\.7\.ff\.net\.2 is not quantized"):
        quantize_with_peer("modelopt_int8_max", denoiser, layers, rows)
