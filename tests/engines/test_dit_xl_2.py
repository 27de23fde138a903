"""DiT-XL/2 at 3-bit weights and activations: its engine's size, memory, and every layer a plugin.

The network is diffusers' own with random packed weights. It is made on the meta device, and its
linears become packed before any of them has memory, so that the test needs 3 GB, not 10.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from numpy.typing import NDArray

from treeq_export.compile.export import export_graph
from treeq_export.compile.stage import compile_target
from treeq_export.engines import BuildOptions, run_build
from treeq_export.model.families.dit import LABELS, DiTDenoiser
from treeq_export.model.quantized import replace_linear
from treeq_export.plan import (
    FORMAT_VERSION,
    LayerPlan,
    ModelRecord,
    Plan,
    StrategyRecord,
    TreePath,
    save_plan,
)
from treeq_export.quant.spec import ActivationFormat, WeightFormat
from treeq_export.recipe import CompileSection

NUM_BLOCKS, WIDTH, BITS = 28, 1152, 3
# Position in a block -> (N, K).
LINEARS = {
    "norm1.linear": (6 * WIDTH, WIDTH),
    "attn1.to_q": (WIDTH, WIDTH),
    "attn1.to_k": (WIDTH, WIDTH),
    "attn1.to_v": (WIDTH, WIDTH),
    "attn1.to_out.0": (WIDTH, WIDTH),
    "ff.net.0.proj": (4 * WIDTH, WIDTH),
    "ff.net.2": (WIDTH, 4 * WIDTH),
}


def make_model() -> DiTDenoiser:
    """Return the network on the meta device; all blocks have the same embedder."""
    with torch.device("meta"):
        model = DiTTransformer2DModel(
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=NUM_BLOCKS,
            sample_size=32,
            patch_size=2,
            num_embeds_ada_norm=1000,
        )
    blocks: Any = model.transformer_blocks
    for block in blocks:
        block.norm1.emb = blocks[0].norm1.emb
    return DiTDenoiser(model, (4, 32, 32), LABELS).eval()


def make_layers() -> Iterator[LayerPlan]:
    for block in range(NUM_BLOCKS):
        for leaf, (position, (n, k)) in enumerate(LINEARS.items()):
            yield LayerPlan(
                name=f"transformer_blocks.{block}.{position}",
                in_features=k,
                out_features=n,
                tree=TreePath(block=block, position=position, leaf=len(LINEARS) * block + leaf),
                weight=WeightFormat(bits=BITS),
                activation=ActivationFormat(bits=BITS, scale="token_rms"),
                rotation_group=128,
            )


def make_tensors(layer: LayerPlan, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    n, k = layer.out_features, layer.in_features
    half = 1 << (BITS - 1)
    return {
        "codes": rng.integers(-half, half, (n, k), dtype=np.int8),
        "weight_scale": np.full((n, 1), 0.01, np.float32),
        "activation_step": np.array([0.6], np.float32),
        "bias": np.zeros(n, np.float32),
    }


def give_memory(model: torch.nn.Module) -> None:
    """Put small random numbers in the place of what is still on the meta device."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, value in [*module.named_parameters(recurse=False)]:
            if value.is_meta:
                data = 0.02 * torch.randn(value.shape, generator=generator)
                setattr(module, name, torch.nn.Parameter(data, requires_grad=False))
        for name, value in [*module.named_buffers(recurse=False)]:
            if value.is_meta:
                setattr(module, name, 0.02 * torch.randn(value.shape, generator=generator))


@pytest.fixture(scope="module")
def xl_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the plan and the graph of target tensorrt."""
    run = tmp_path_factory.mktemp("xl")
    denoiser = make_model()
    layers = tuple(make_layers())
    rng = np.random.default_rng(0)
    tensors: dict[str, NDArray[Any]] = {}
    for layer in layers:
        own = make_tensors(layer, rng)
        replace_linear(denoiser, layer, own)
        tensors |= {f"{layer.name}.{name}": own[name] for name in ("codes", "weight_scale")}
    give_memory(denoiser)
    plan = Plan(
        format_version=FORMAT_VERSION,
        model=ModelRecord(name="xl", class_name="DiTTransformer2DModel", num_parameters=0),
        checkpoint_sha256="0" * 64,
        strategy=StrategyRecord(name="uniform", options={}),
        layers=layers,
    )
    plan = save_plan(run, plan)
    section = CompileSection(targets=["tensorrt"], max_batch=16)
    graph = export_graph(denoiser, section.max_batch)
    compile_target(run, graph, "tensorrt", plan, tensors, section)
    return run


@pytest.mark.slow
def test_the_engine_is_below_300_mb_and_8_gb_and_every_layer_a_plugin(xl_run: Path):
    started = time.monotonic()
    options = BuildOptions("tensorrt-rtx", ("sm_89",))
    record = run_build(xl_run, options, CompileSection(), lambda *_: lambda _: None)
    (engine,) = record.engines
    manifest = engine.manifest
    assert manifest.verifier.num_quantized == NUM_BLOCKS * len(LINEARS)
    assert manifest.verifier.num_plugins == manifest.verifier.num_quantized
    assert manifest.engine_bytes <= 300e6
    assert manifest.engine_bytes >= sum(n * k for n, k in LINEARS.values()) * NUM_BLOCKS * 3 / 8
    assert 200e6 < manifest.peak_bytes <= 8e9
    assert manifest.build_s <= time.monotonic() - started
