"""The door for programs gives what the stages write, and leaves what it was given."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import treeq_export
from tests.export_cache import export_once
from tests.tiny_models import TinyRun
from treeq_export import api
from treeq_export.errors import CheckpointError, PlanError, RecipeError
from treeq_export.model.checkpoint import load_model
from treeq_export.plan import load_plan, load_tensors
from treeq_export.recipe import Recipe


def settings(recipe: Recipe, section: str) -> dict[str, Any]:
    return recipe.model_dump(mode="json", by_alias=True)[section]


@pytest.fixture(scope="module")
def model(compiled_dit: TinyRun) -> api.Model:
    """The network of `compiled_dit`, opened from its folder."""
    recipe = compiled_dit.recipe
    return api.load(
        recipe.model.checkpoint,
        name=recipe.name,
        sampler=settings(recipe, "sampler"),
        latent_size=recipe.model.latent_size,
    )


@pytest.fixture(scope="module")
def quantized(model: api.Model, compiled_dit: TinyRun) -> api.Quantized:
    """The same as `compiled_dit`."""
    found = api.search(model, **settings(compiled_dit.recipe, "search"))
    return api.calibrate(found, **settings(compiled_dit.recipe, "calibrate"))


@pytest.fixture
def exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "export_graph", export_once)


class TestEqualsTheStages:
    def test_plan_and_tensors(self, quantized: api.Quantized, compiled_dit: TinyRun) -> None:
        assert quantized.plan == compiled_dit.plan
        assert quantized.tensors.keys() == compiled_dit.tensors.keys()
        for name, tensor in compiled_dit.tensors.items():
            assert np.array_equal(quantized.tensors[name], tensor)
        assert quantized.searched is not None
        assert quantized.searched.strategy == "uniform"

    @pytest.mark.usefixtures("exported_once")
    def test_graph(self, quantized: api.Quantized, compiled_dit: TinyRun, tmp_path: Path) -> None:
        section = settings(compiled_dit.recipe, "compile")
        del section["targets"]
        graph = api.compile(quantized, "portable", tmp_path / "p.onnx", **section)
        written = compiled_dit.run / "onnx" / "portable" / "model.onnx"
        assert (tmp_path / "p.onnx").read_bytes() == written.read_bytes()
        assert [entry.name for entry in graph.audit] == [x.name for x in quantized.plan.layers]

    def test_saved_files(
        self, model: api.Model, quantized: api.Quantized, compiled_dit: TinyRun, tmp_path: Path
    ) -> None:
        saved = quantized.save(tmp_path)
        for name in ("plan.json", "plan.safetensors"):
            assert (tmp_path / name).read_bytes() == (compiled_dit.run / name).read_bytes()
        assert saved.plan == quantized.plan == load_plan(tmp_path)
        opened = api.open_quantized(model, tmp_path)
        assert opened.plan == quantized.plan
        assert opened.tensors.keys() == load_tensors(tmp_path, opened.plan).keys()

    def test_plan_without_tensors(self, model: api.Model, tmp_path: Path) -> None:
        api.search(model, branch=None).save(tmp_path)
        opened = api.open_quantized(model, tmp_path)
        assert opened.tensors == {}
        with pytest.raises(PlanError, match=r"no scales and codes\. Call api\.calibrate first"):
            _ = opened.denoiser


class TestLoad:
    def test_a_network_in_memory_is_left_as_it_is(self, compiled_dit: TinyRun) -> None:
        network = load_model(compiled_dit.checkpoint).train().requires_grad_(True)
        opened = api.load(network)
        assert network.training
        assert all(parameter.requires_grad for parameter in network.parameters())
        assert not any(parameter.requires_grad for parameter in opened.denoiser.parameters())
        assert opened.checkpoint.class_name == "DiTTransformer2DModel"
        weight = network.get_parameter("transformer_blocks.0.attn1.to_q.weight")
        shared = opened.denoiser.model.get_parameter("transformer_blocks.0.attn1.to_q.weight")
        assert shared.data_ptr() == weight.data_ptr()

    def test_half_precision_is_widened(self, compiled_dit: TinyRun) -> None:
        network = load_model(compiled_dit.checkpoint).half()
        opened = api.load(network)
        assert {p.dtype for p in opened.denoiser.parameters()} == {torch.float32}
        assert {p.dtype for p in network.parameters()} == {torch.float16}
        assert opened.checkpoint.sha256 != api.load(network.float()).checkpoint.sha256

    def test_another_network(self) -> None:
        with pytest.raises(CheckpointError, match=r"Linear: no supported network\. Supported: DiT"):
            api.load(nn.Linear(2, 2))

    def test_wrong_settings(self, compiled_dit: TinyRun) -> None:
        folder = compiled_dit.checkpoint.path
        with pytest.raises(RecipeError, match=r"settings: sampler\.step: unknown key"):
            api.load(folder, sampler={"step": 2})
        with pytest.raises(RecipeError, match="takes class labels, no text"):
            api.load(folder, num_text_tokens=3)
        with pytest.raises(CheckpointError, match="no such file or folder"):
            api.load("gone")


class TestSettings:
    def test_are_kept_for_later_steps(self, quantized: api.Quantized, model: api.Model) -> None:
        assert quantized.model.recipe.calibrate.num_samples == 3
        assert (
            model.recipe.calibrate.num_samples
            == Recipe.model_validate(
                {"name": "x", "model": {"checkpoint": "c"}}
            ).calibrate.num_samples
        )

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda q: api.search(q.model, weight_bits=9), "search.weight_bits: received 9"),
            (lambda q: api.calibrate(q, num_sample=3), "Did you mean num_samples"),
            (lambda q: api.finetune(q, mode="none"), "received none, expected peft or qat"),
            (lambda q: api.compile(q, "cuda"), "compile.targets.0: received 'cuda'"),
            (lambda q: api.validate(q, batch_size=0), "validate.batch_size: received 0"),
        ],
    )
    def test_wrong_ones_are_one_line(
        self, quantized: api.Quantized, call: Callable[[api.Quantized], object], message: str
    ) -> None:
        with pytest.raises(RecipeError, match=message):
            call(quantized)


@pytest.mark.usefixtures("exported_once")
def test_trained_and_validated_in_memory(quantized: api.Quantized) -> None:
    steps: list[float] = []
    options = {"steps": 2, "batch_size": 2, "num_trajectories": 2, "held_out_rows": 2}
    trained = api.finetune(quantized, on_step=steps.append, check_every=1, **options)
    assert steps[-1] == 1.0
    assert trained.trained is not None
    assert trained.trained.base_tensors_sha256 == quantized.plan.tensors_sha256
    assert trained.plan.tensors_sha256 != quantized.plan.tensors_sha256
    assert quantized.trained is None
    graph = api.compile(trained, "portable", max_batch=4)
    assert isinstance(graph.model, ir.Model)
    assert graph.path is None
    parity = api.validate(trained, graph, batch_size=2, gates={"min_layer_sqnr_db": 30})
    [target] = parity.targets
    assert target.passed
    assert [layer.name for layer in target.layers] == [layer.name for layer in trained.plan.layers]
    with pytest.raises(PlanError, match="no scales and codes"):
        api.validate(api.search(trained.model), graph)


@pytest.mark.usefixtures("exported_once")
def test_weights_beside_the_graph(quantized: api.Quantized, tmp_path: Path) -> None:
    path = tmp_path / "new" / "net.onnx"
    graph = api.compile(quantized, "portable", path, external_data="always", max_batch=4)
    assert sorted(file.name for file in path.parent.iterdir()) == ["net.onnx", "net.onnx.data"]
    [target] = api.validate(quantized, graph, batch_size=2).targets
    assert target.passed


def test_importing_the_package_imports_no_framework() -> None:
    program = "import sys, treeq_export; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert treeq_export.__getattr__("api") is api
    with pytest.raises(AttributeError, match="module 'treeq_export' has no attribute 'quantise'"):
        _ = treeq_export.quantise
