"""Putting a plan into a whole model."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from treeq_export.errors import PlanError
from treeq_export.model.layers import discover_linears
from treeq_export.model.qlinear import QLinear
from treeq_export.model.quantized import (
    layer_tensors,
    linear_of,
    quantize_model,
    quantized_layers,
)
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import (
    FORMAT_VERSION,
    LayerPlan,
    ModelRecord,
    Plan,
    StrategyRecord,
    Tensors,
    TreePath,
    load_tensors,
    save_plan,
)
from treeq_export.quant import numerics
from treeq_export.quant.metrics import sqnr_db
from treeq_export.quant.spec import ActivationFormat, BranchFormat, WeightFormat

MakeDenoiser = Callable[..., Denoiser]


def make_layer(
    name: str, n: int, k: int, act_bits: int | None = 8, branch: BranchFormat | None = None
) -> LayerPlan:
    return LayerPlan(
        name=name,
        in_features=k,
        out_features=n,
        tree=TreePath(block=0, position=name, leaf=0),
        weight=WeightFormat(bits=8),
        activation=ActivationFormat(bits=act_bits, scale="token_rms" if act_bits else "none"),
        branch=branch,
    )


def make_plan(layers: list[LayerPlan]) -> tuple[Plan, Tensors]:
    """A plan with random tensors."""
    plan = Plan(
        format_version=FORMAT_VERSION,
        model=ModelRecord(name="tiny", class_name="DiTTransformer2DModel", num_parameters=1),
        checkpoint_sha256="0",
        strategy=StrategyRecord(name="uniform", options={}),
        layers=tuple(layers),
    )
    rng = np.random.default_rng(0)
    tensors: Tensors = {}
    for layer in layers:
        n, k = layer.out_features, layer.in_features
        tensors[f"{layer.name}.codes"] = rng.integers(-128, 128, (n, k)).astype(np.int8)
        scale = rng.uniform(0.0005, 0.002, (n, 1))
        tensors[f"{layer.name}.weight_scale"] = scale.astype(np.float32)
        step = numerics.activation_step(layer.activation)
        if step is not None:
            tensors[f"{layer.name}.activation_step"] = np.array([step], dtype=np.float32)
        if layer.branch is not None:
            rank = layer.branch.rank  # of one block
            tensors[f"{layer.name}.branch.R"] = np.ones((1, k, rank), dtype=np.float32)
            tensors[f"{layer.name}.branch.L"] = np.ones((1, rank, n), dtype=np.float32)
    return plan, tensors


def plan_of(denoiser: Denoiser, act_bits: int | None = 8) -> tuple[Plan, Tensors]:
    """All linears of the blocks, and the last layer, which lies at the top of the module tree."""
    layers = [
        make_layer(info.name, info.out_features, info.in_features, act_bits)
        for info in discover_linears(denoiser)
    ]
    last = denoiser.model.get_submodule("proj_out_2")
    assert isinstance(last, nn.Linear)
    layers.append(make_layer("proj_out_2", last.out_features, last.in_features, act_bits))
    return make_plan(layers)


def predict(denoiser: Denoiser) -> Tensor:
    with torch.no_grad():
        return denoiser(*denoiser.make_example_inputs(2, seed=0).values())


def test_planned_linears_are_replaced_and_nothing_else(make_tiny_denoiser: MakeDenoiser):
    denoiser = make_tiny_denoiser("dit")
    plan, tensors = plan_of(denoiser)
    quantized = quantize_model(denoiser, plan, tensors)
    names = [layer.name for layer in plan.layers]
    assert "transformer_blocks.1.attn1.to_out.0" in names
    assert set(quantized_layers(quantized)) == set(names)
    for name, module in denoiser.model.named_modules():
        expected = QLinear if name in names else type(module)
        assert type(quantized.model.get_submodule(name)) is expected
    assert not any(module.training for module in quantized.modules())
    for name, module in quantized_layers(quantized).items():
        assert np.array_equal(module.codes, tensors[f"{name}.codes"])


def test_the_original_is_left_as_it_was(make_tiny_denoiser: MakeDenoiser):
    denoiser = make_tiny_denoiser("dit")
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    expected = predict(denoiser)
    quantized = quantize_model(denoiser, *plan_of(denoiser))
    assert not torch.equal(predict(quantized), expected)
    assert torch.equal(predict(denoiser), expected)
    assert quantized_layers(denoiser) == {}
    after = denoiser.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_untouched_tensors_are_shared(make_tiny_denoiser: MakeDenoiser):
    denoiser = make_tiny_denoiser("dit")
    plan, tensors = plan_of(denoiser)
    quantized = quantize_model(denoiser, plan, tensors)
    replaced = {f"{layer.name}.weight" for layer in plan.layers}
    originals = dict(denoiser.model.named_parameters()) | dict(denoiser.model.named_buffers())
    copies = dict(quantized.model.named_parameters()) | dict(quantized.model.named_buffers())
    shared = set(originals) - replaced
    assert len(shared) > len(replaced)
    for name in shared:
        assert copies[name].data_ptr() == originals[name].data_ptr(), name
    assert not replaced & set(copies)


def test_a_quantized_model_computes_with_the_dequantized_weights(make_tiny_denoiser: MakeDenoiser):
    denoiser = make_tiny_denoiser("dit")
    plan, tensors = plan_of(denoiser, act_bits=None)
    quantized = quantize_model(denoiser, plan, tensors)
    plain = copy.deepcopy(denoiser)
    with torch.no_grad():
        for layer in plan.layers:
            own = layer_tensors(tensors, layer.name)
            w_hat = numerics.dequantize_weight(own["codes"], own["weight_scale"])
            linear_of(plain, layer).weight.copy_(torch.from_numpy(w_hat))
    assert sqnr_db(predict(plain), predict(quantized)) > 100


def test_tensors_read_from_a_file_can_be_trained(tmp_path: Path):
    plan, tensors = make_plan(
        [make_layer("layer", 24, 64, branch=BranchFormat(b_in=1, b_out=1, rank=2))]
    )
    plan = save_plan(tmp_path, plan, tensors)
    own = layer_tensors(load_tensors(tmp_path, plan), "layer")
    module = QLinear(plan.layers[0], own, None)  # PyTorch warns of arrays that cannot be written
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    assert np.array_equal(module.codes, tensors["layer.codes"])
    assert np.array_equal(module.weight_scale.numpy(), tensors["layer.weight_scale"] + 1)


def test_layer_tensors_by_short_name():
    one = np.zeros(1)
    tensors = {"a.codes": one, "a.branch.R": one, "a.b.codes": one, "ab.codes": one}
    assert set(layer_tensors(tensors, "ab")) == {"codes"}
    assert set(layer_tensors(tensors, "a.b")) == {"codes"}
    assert layer_tensors(tensors, "a")["branch.R"] is one
    assert layer_tensors(tensors, "b") == {}


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            make_layer("transformer_blocks.7.attn1.to_q", 64, 64),
            "transformer_blocks.7.attn1.to_q: the model has no such layer. Search again.",
        ),
        (
            make_layer("transformer_blocks.0.norm3", 64, 64),
            "transformer_blocks.0.norm3: is a LayerNorm, expected Linear.",
        ),
        (
            make_layer("transformer_blocks.0.attn1.to_q", 32, 64),
            (
                "transformer_blocks.0.attn1.to_q: shape (64, 64), the plan says (32, 64). "
                "Search again."
            ),
        ),
    ],
)
def test_a_plan_of_another_model_is_refused(
    layer: LayerPlan, message: str, make_tiny_denoiser: MakeDenoiser
):
    denoiser = make_tiny_denoiser("dit")
    with pytest.raises(PlanError) as caught:
        quantize_model(denoiser, *make_plan([layer]))
    assert str(caught.value) == message
    assert quantized_layers(denoiser) == {}
