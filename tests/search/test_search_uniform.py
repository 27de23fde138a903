from dataclasses import replace
from typing import Any

import pytest

from treeq_export.errors import FormatError
from treeq_export.model.layers import LinearInfo
from treeq_export.quant.spec import ActivationFormat, BranchFormat, WeightFormat
from treeq_export.recipe import SearchSection
from treeq_export.search.budget import CostModel
from treeq_export.search.formats import assign as assign_configuration
from treeq_export.search.formats import make_activation_format, make_layer_plan
from treeq_export.search.network import make_network
from treeq_export.search.strategies.context import SearchContext
from treeq_export.search.strategies.uniform import search_uniform


def make_linear(name: str = "blocks.0.fc", k: int = 64, n: int = 96, **place: Any) -> LinearInfo:
    fields = {"has_bias": True, "block": 0, "position": "fc", "leaf": 0} | place
    return LinearInfo(name=name, in_features=k, out_features=n, **fields)


def assign(linears: list[LinearInfo], section: SearchSection) -> Any:
    branches = {} if section.branch is None else {x.name: section.branch for x in linears}
    return assign_uniform(linears, section, branches)


def assign_uniform(
    linears: list[LinearInfo], section: SearchSection, branches: dict[str, BranchFormat]
) -> Any:
    network = replace(make_network(linears), branches=branches)
    outcome = search_uniform(SearchContext(section, network, CostModel(network, section)))
    return assign_configuration(network, outcome.configuration, section)


def make_section(**fields: Any) -> SearchSection:
    return SearchSection.model_validate({"rotation_group": 32, "branch": None} | fields)


@pytest.mark.parametrize("bits", range(2, 9))
def test_auto_takes_rms_below_seven_bits(bits: int):
    scale = "token_rms" if bits < 7 else "token_absmax"
    assert make_activation_format(SearchSection(), bits) == ActivationFormat(bits=bits, scale=scale)


@pytest.mark.parametrize("scale", ["token_rms", "token_absmax", "tensor_static"])
@pytest.mark.parametrize("bits", [2, 8])
def test_named_scales_are_taken_at_any_width(bits: int, scale: Any):
    section = SearchSection(activation_scale=scale)
    assert make_activation_format(section, bits) == ActivationFormat(bits=bits, scale=scale)


@pytest.mark.parametrize("scale", ["auto", "token_rms", "tensor_static"])
def test_no_bits_is_weight_only(scale: Any):
    section = SearchSection(activation_scale=scale)
    assert make_activation_format(section, None) == ActivationFormat(bits=None, scale="none")


def test_every_layer_gets_the_same_formats():
    section = make_section(
        weight_bits=3,
        activation_bits=5,
        group_size=16,
        rotation_group=8,
        branch={"b_in": 2, "b_out": 4, "rank": 2},
    )
    linears = [
        make_linear("blocks.0.a", 64, 96, block=0, position="a", leaf=0),
        make_linear("blocks.1.b", 128, 32, block=1, position="b", leaf=3),
    ]
    layers = assign(linears, section)
    assert [layer.name for layer in layers] == ["blocks.0.a", "blocks.1.b"]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(64, 96), (128, 32)]
    assert layers[1].tree.model_dump() == {"block": 1, "position": "b", "leaf": 3}
    for layer in layers:
        assert layer.weight == WeightFormat(bits=3, group_size=16)
        assert layer.activation == ActivationFormat(bits=5, scale="token_rms")
        assert layer.rotation_group == 8
        assert layer.branch == BranchFormat(b_in=2, b_out=4, rank=2)


def test_a_fractional_budget_takes_two_widths():
    section = make_section(budget={"weight_bits": 2.5, "activation_bits": 4})
    linears = [make_linear(f"blocks.{b}.fc", block=b, leaf=b) for b in range(4)]
    layers = assign(linears, section)
    assert [layer.weight.bits for layer in layers] == [3, 2, 3, 2]
    assert {layer.activation.bits for layer in layers} == {4}


def test_a_layer_that_stays_out_of_branches_has_none():
    section = make_section()
    linears = [make_linear("blocks.0.a"), make_linear("blocks.0.b")]
    branch = BranchFormat(b_in=1, b_out=1, rank=2)
    layers = assign_uniform(linears, section, {"blocks.0.b": branch})
    assert [layer.branch for layer in layers] == [None, branch]
    layer = make_layer_plan(linears[0], section, 4, None, None)
    assert layer.activation == ActivationFormat(bits=None, scale="none")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group_size": 24}, "group_size 24 does not divide in_features 64. .* 16 and 32"),
        ({"rotation_group": 128}, "rotation_group 128 is no power of two .* 64"),
        ({"rotation_group": 48}, "rotation_group 48 is no power of two .* 32 and 64"),
        ({"branch": {"b_in": 3, "b_out": 1, "rank": 1}}, "branch b_in 3 does not divide 64"),
        ({"branch": {"b_in": 1, "b_out": 5, "rank": 1}}, "branch b_out 5 does not divide 96"),
        ({"branch": {"b_in": 8, "b_out": 1, "rank": 9}}, "branch rank 9 .* at most 8"),
    ],
)
def test_formats_that_do_not_fit_name_the_layer(fields: dict[str, Any], message: str):
    with pytest.raises(FormatError, match=rf"^blocks\.7\.fc: {message}"):
        assign([make_linear("blocks.7.fc")], make_section(**fields))


def test_the_layer_that_does_not_fit_is_named():
    linears = [make_linear("blocks.0.a", 64), make_linear("blocks.0.b", 80)]
    with pytest.raises(FormatError, match=r"^blocks\.0\.b: rotation_group 32 .* 16\."):
        assign(linears, make_section())


@pytest.mark.parametrize(
    ("in_features", "group"), [(64, 64), (96, 32), (1152, 128), (36, 4), (35, 1), (4096, 128)]
)
def test_auto_rotates_each_layer_by_the_largest_group_that_fits(in_features: int, group: int):
    section = make_section(rotation_group="auto")
    (layer,) = assign([make_linear("blocks.0.a", in_features)], section)
    assert layer.rotation_group == group
    layer.check_shapes()
    assert SearchSection().rotation_group == "auto"


def test_auto_gives_what_128_gave_where_that_fits():
    linears = [make_linear("blocks.0.a", 128), make_linear("blocks.0.b", 384)]
    auto, fixed = (assign(linears, make_section(rotation_group=g)) for g in ("auto", 128))
    assert auto == fixed
