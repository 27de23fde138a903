"""The one description of a layer and its ops, and who may know what an activation scale is."""

import ast
import copy
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hand_layers import make_format
from treeq_export.ops import (
    ACT_SCALES,
    FUSED,
    LAYER_ATTRIBUTES,
    OPS,
    QLINEAR,
    ActScale,
    LayerFormat,
)

ROOT = Path(__file__).parents[1]


def test_the_header_of_the_kernels_is_what_the_script_writes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script puts the checkout first
    script = runpy.run_path(str(ROOT / "kernels" / "write_op_header.py"))
    assert script["HEADER"].read_text() == script["header"]()


def test_an_activation_scale_is_its_text_and_has_a_number():
    assert [scale.number for scale in ACT_SCALES] == [1, 2, 3]
    assert ActScale.NONE.number == 0
    assert [scale.statistic for scale in ACT_SCALES] == ["rms", "absmax", "static"]
    for scale in ActScale:
        assert ActScale(scale.value) is scale
        assert copy.deepcopy(scale) is scale
        assert json.dumps(scale) == f'"{scale}"' == f'"{scale.value}"'
    with pytest.raises(ValueError, match="token_max"):
        ActScale("token_max")


def test_attributes_are_plain_and_carry_the_whole_layer():
    layer = make_format(act_scale="tensor_static", group_size=32)
    attributes = layer.attributes()
    assert list(attributes) == list(LAYER_ATTRIBUTES)
    assert [type(value) for value in attributes.values()] == list(LAYER_ATTRIBUTES.values())
    assert LayerFormat.from_attributes(attributes | {"plugin_version": "1"}) == layer
    assert layer.num_groups == 2
    with pytest.raises(KeyError, match="act_step"):
        LayerFormat.from_attributes({k: v for k, v in attributes.items() if k != "act_step"})


@pytest.mark.parametrize(("bits", "expected"), [(2, (-2, 1)), (8, (-128, 127))])
def test_codes_are_twos_complement(bits: int, expected: tuple[int, int]):
    assert make_format(act_bits=bits).code_range == expected


def test_inputs_are_found_by_name():
    assert QLINEAR.inputs[:4] == FUSED.inputs[:4]
    values = ("x", "planes", "scale", None, "branch")
    assert QLINEAR.pick(values, "addend") == FUSED.pick(values, "branch_R") == "branch"
    assert QLINEAR.pick(values, "bias") is FUSED.pick(values, "gate") is None
    with pytest.raises(ValueError, match="not in tuple"):
        QLINEAR.pick(values, "gate")
    assert len({op.name for op in OPS}) == len(OPS)


def mentions_a_scale(path: Path) -> bool:
    """Whether code, not a docstring, spells an activation scale."""
    names = {scale.name for scale in ACT_SCALES}
    texts: set[Any] = {scale.value for scale in ACT_SCALES}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in names:
            return True
        if isinstance(node, ast.Constant) and node.value in texts:
            return True
    return False


def test_an_activation_scale_is_known_in_few_files():
    files = [*(ROOT / "treeq_export").rglob("*.py"), *(ROOT / "kernels" / "gpu").rglob("*.py")]
    knowing = sorted(path.relative_to(ROOT).as_posix() for path in files if mentions_a_scale(path))
    assert len(knowing) <= 8, knowing
