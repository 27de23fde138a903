"""Every format that a TensorRT target lacks is refused by name, when it is compiled."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.hand_layers import lower
from treeq_export.compile.passes.check_formats import CheckFormats
from treeq_export.errors import CompileError
from treeq_export.targets.names import ENGINES, TENSORRT, TENSORRT_NATIVE

Make = Callable[..., Any]
WEIGHT_ONLY = {"act_bits": None, "act_scale": "none"}


def refusal(target: str, make_model: Make, *layers: Any) -> str:
    with pytest.raises(CompileError) as caught:
        lower(make_model(*layers), target)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_block_scaled_weights_with_int8_activations_in_native(make_layer: Make, make_model: Make):
    """TensorRT builds a wrong engine from these and does not warn."""
    layers = [
        make_layer(name="blocks.0.a", group_size=32),
        make_layer(name="blocks.0.b", seed=1),
        make_layer(name="blocks.1.a", group_size=32, seed=2),
    ]
    message = refusal(TENSORRT_NATIVE, make_model, *layers)
    assert message.startswith(
        "blocks.0.a, blocks.1.a: group_size 32 with 4-bit activations: TensorRT builds a wrong "
        "engine from block-scaled weights and INT8 activations. Set search.group_size to null"
    )
    assert "blocks.0.b" not in message
    # The plugin has them.
    lower(make_model(*layers), TENSORRT)


def test_groups_that_the_kernels_lack(make_layer: Make, make_model: Make):
    message = refusal(TENSORRT, make_model, make_layer(group_size=16))
    assert message.startswith("blocks.0.fc: group_size 16 is no multiple of 32")


def test_rotation_that_the_kernels_lack(make_layer: Make, make_model: Make):
    layer = make_layer(k=256, rotation_group=256)
    message = refusal(TENSORRT, make_model, layer)
    assert message.startswith("blocks.0.fc: rotation_group 256 is above 128")
    assert "search.rotation_group to 128" in message
    lower(make_model(layer), TENSORRT_NATIVE)


@pytest.mark.parametrize("target", ENGINES)
@pytest.mark.parametrize(
    ("field", "bits"), [("weight_bits", 1), ("weight_bits", 9), ("act_bits", 1), ("act_bits", 9)]
)
def test_bits_out_of_range(field: str, bits: int, target: str, make_layer: Make, make_model: Make):
    import onnx_ir as ir

    model = make_model(make_layer())
    model.graph[0].attributes.add(ir.AttrInt64(field, bits))
    with pytest.raises(CompileError, match=rf"^blocks\.0\.fc: {field} {bits}, expected 2\.\.8\."):
        CheckFormats(native=target == TENSORRT_NATIVE)(model)


@pytest.mark.parametrize("target", ENGINES)
@pytest.mark.parametrize("group_size", [8, 256])
def test_weight_only_blocks(group_size: int, target: str, make_layer: Make, make_model: Make):
    layer = make_layer(k=512, group_size=group_size, **WEIGHT_ONLY)
    message = refusal(target, make_model, layer)
    assert re.match(rf"blocks\.0\.fc: group_size {group_size} without quantized", message)
    assert "blocks of 16..128" in message


def test_one_group_of_all_channels_is_a_channel_scale(make_layer: Make, make_model: Make):
    for target in ENGINES:
        lower(make_model(make_layer(group_size=64)), target)


def test_many_layers_are_counted(make_layer: Make, make_model: Make):
    layers = [make_layer(name=f"blocks.{i}.fc", group_size=16, seed=i) for i in range(11)]
    message = refusal(TENSORRT, make_model, *layers)
    assert "blocks.7.fc and 3 more: group_size 16" in message


def test_a_recipe_s_run_is_refused_before_anything_is_written(make_tiny_run: Make, tmp_path: Any):
    """From search to compile: a plan with groups, compiled for tensorrt-native."""
    from treeq_export.compile.stage import compile_target
    from treeq_export.recipe import CompileSection

    tiny = make_tiny_run("dit", group_size=32)
    with pytest.raises(CompileError, match=r"transformer_blocks\.0\.attn1\.to_q.* 6 more: group_"):
        compile_target(
            tmp_path, tiny.export(), TENSORRT_NATIVE, tiny.plan, tiny.tensors, CompileSection()
        )
    assert not list(tmp_path.iterdir())
