from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from treeq_export.model.layers import LinearInfo, discover_linears
from treeq_export.model.zoo import Denoiser

MakeDenoiser = Callable[..., Denoiser]


def test_dit_layers_in_execution_order(make_tiny_denoiser: MakeDenoiser):
    found = discover_linears(make_tiny_denoiser("dit"))
    positions = [
        ("norm1.linear", 64, 384, 0),
        ("attn1.to_q", 64, 64, 1),
        ("attn1.to_k", 64, 64, 1),
        ("attn1.to_v", 64, 64, 1),
        ("attn1.to_out.0", 64, 64, 2),
        ("ff.net.0.proj", 64, 256, 3),
        ("ff.net.2", 256, 64, 4),
    ]
    assert found == [
        LinearInfo(
            name=f"transformer_blocks.{block}.{position}",
            in_features=k,
            out_features=n,
            has_bias=True,
            block=block,
            position=position,
            leaf=5 * block + leaf,
        )
        for block in range(2)
        for position, k, n, leaf in positions
    ]


@pytest.mark.parametrize("family", ["dit", "pixart", "sd3", "flux"])
def test_every_block_linear_is_found_and_nothing_else(
    family: str, make_tiny_denoiser: MakeDenoiser
):
    denoiser = make_tiny_denoiser(family)
    found = discover_linears(denoiser)
    modules = dict(denoiser.model.named_modules())
    expected = {
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear)
        and name.split(".")[0] in ("transformer_blocks", "single_transformer_blocks")
        and ".emb." not in name
    }
    assert {info.name for info in found} == expected
    assert len(found) == len(expected)
    for info in found:
        weight = denoiser.model.get_parameter(f"{info.name}.weight")
        assert tuple(weight.shape) == (info.out_features, info.in_features)
        assert info.name.endswith(f".{info.position}")
        assert info.in_features % 64 == 0


@pytest.mark.parametrize("family", ["dit", "pixart", "sd3", "flux"])
def test_blocks_and_leaves_are_numbered_without_gaps(family: str, make_tiny_denoiser: MakeDenoiser):
    found = discover_linears(make_tiny_denoiser(family))
    assert list(dict.fromkeys(info.block for info in found)) == [0, 1]
    leaves = list(dict.fromkeys(info.leaf for info in found))
    assert leaves == list(range(len(leaves)))
    for leaf in leaves:
        members = [info for info in found if info.leaf == leaf]
        assert len({(info.block, info.in_features) for info in members}) == 1


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("pixart", [{"attn1.to_q", "attn1.to_k", "attn1.to_v"}, {"attn2.to_k", "attn2.to_v"}]),
        (
            "sd3",
            [
                {"attn.to_q", "attn.to_k", "attn.to_v"},
                {"attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"},
            ],
        ),
    ],
)
def test_layers_with_the_same_input_share_a_leaf(
    family: str, groups: list[set[str]], make_tiny_denoiser: MakeDenoiser
):
    found = discover_linears(make_tiny_denoiser(family))
    for block in (0, 1):
        by_leaf: dict[int, set[str]] = {}
        for info in found:
            if info.block == block:
                by_leaf.setdefault(info.leaf, set()).add(info.position)
        assert [members for members in by_leaf.values() if len(members) > 1] == groups


def test_flux_blocks_continue_over_both_lists(make_tiny_denoiser: MakeDenoiser):
    found = discover_linears(make_tiny_denoiser("flux"))
    lists = {(info.name.split(".")[0], info.block) for info in found}
    assert lists == {("transformer_blocks", 0), ("single_transformer_blocks", 1)}
    single = {info.position: info.leaf for info in found if info.block == 1}
    assert single["proj_mlp"] == single["attn.to_q"] == single["attn.to_k"] == single["attn.to_v"]
    assert single["proj_out"] > single["proj_mlp"] > single["norm.linear"]


class Twice(nn.Module):
    """A network whose first linear runs again at the end, and whose third never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(4, 4, bias=False)})])
        self.blocks[0]["b"] = nn.Linear(4, 4)
        self.blocks[0]["idle"] = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.blocks[0]["a"], self.blocks[0]["b"]
        return self.head(first(second(first(x))))


class TwiceDenoiser(Denoiser):
    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(inputs[0])


def test_a_linear_that_runs_twice_counts_once_and_an_idle_one_never():
    denoiser = TwiceDenoiser(Twice(), (4,), {})
    assert [(i.name, i.has_bias, i.leaf) for i in discover_linears(denoiser)] == [
        ("blocks.0.a", False, 0),
        ("blocks.0.b", True, 1),
    ]


def test_discovery_leaves_no_hooks_and_changes_no_output(make_tiny_denoiser: MakeDenoiser):
    denoiser = make_tiny_denoiser("dit")
    inputs = list(denoiser.make_example_inputs(2, seed=0).values())
    before = denoiser(*inputs)
    discover_linears(denoiser)
    assert not any(module._forward_pre_hooks for module in denoiser.modules())
    assert torch.equal(denoiser(*inputs), before)
