from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from treeq_export.errors import CheckpointError
from treeq_export.model.checkpoint import open_checkpoint
from treeq_export.model.conditioning import make_denoiser
from treeq_export.model.layers import LinearInfo, discover, discover_linears
from treeq_export.model.zoo import Denoiser
from treeq_export.recipe import ModelSection

MakeDenoiser = Callable[..., Denoiser]
# The last joint block of SD3 makes queries of the text, and throws away what they give.
UNUSED = {"sd3": ["transformer_blocks.1.attn.add_q_proj"]}


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
    } - set(UNUSED.get(family, ()))
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
        gone = {name.split(".", 2)[2] for name in UNUSED.get(family, ()) if f".{block}." in name}
        expected = [members - gone for members in groups]
        assert [members for members in by_leaf.values() if len(members) > 1] == expected


def test_flux_blocks_continue_over_both_lists(make_tiny_denoiser: MakeDenoiser):
    found = discover_linears(make_tiny_denoiser("flux"))
    lists = {(info.name.split(".")[0], info.block) for info in found}
    assert lists == {("transformer_blocks", 0), ("single_transformer_blocks", 1)}
    single = {info.position: info.leaf for info in found if info.block == 1}
    assert single["proj_mlp"] == single["attn.to_q"] == single["attn.to_k"] == single["attn.to_v"]
    assert single["proj_out"] > single["proj_mlp"] > single["norm.linear"]


class Small(nn.Module):
    """A network of one block; `path` says what becomes of its layers a, b and c."""

    def __init__(self, path: Callable[[nn.ModuleDict, Tensor], Tensor]) -> None:
        super().__init__()
        layers = {name: nn.Linear(4, 4, bias=name != "a") for name in ("a", "b", "c", "idle")}
        self.blocks = nn.ModuleList([nn.ModuleDict(layers)])
        self.head = nn.Linear(4, 4)
        self.path = path
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.path(self.blocks[0], x))


class SmallDenoiser(Denoiser):
    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(inputs[0])


def discover_small(path: Callable[[Any, Tensor], Tensor]) -> tuple[list[str], list[str]]:
    found = discover(SmallDenoiser(Small(path), (4,), {}))
    return [info.position for info in found.linears], found.unused


def after_side_effect(x: Tensor, *ignored: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("path", "used", "unused"),
    [
        (lambda m, x: m["b"](m["a"](x)), ["a", "b"], []),
        (lambda m, x: after_side_effect(m["a"](x), m["b"](x)), ["a"], ["blocks.0.b"]),
        # Sliced away, as half of a joint attention is.
        (lambda m, x: torch.cat([m["a"](x), m["b"](x)])[: len(x)], ["a"], ["blocks.0.b"]),
        # A gate of zero, as in a network that was not trained: it may become another.
        (lambda m, x: m["a"](x) + 0 * m["b"](x), ["a", "b"], []),
        # No derivative, but another value gives another result.
        (lambda m, x: m["a"](x) + m["b"](x).detach(), ["a", "b"], []),
        (lambda m, x: m["a"](x) * m["c"](m["b"](x).detach()), ["a", "b", "c"], []),
        (
            lambda m, x: after_side_effect(m["a"](x) + m["b"](x).detach(), m["c"](x)),
            ["a", "b"],
            ["blocks.0.c"],
        ),
    ],
)
def test_layers_that_no_prediction_depends_on_are_left_out(
    path: Callable[[Any, Tensor], Tensor], used: list[str], unused: list[str]
):
    assert discover_small(path) == (used, unused)


def test_leaves_of_what_is_left_have_no_gaps():
    found = discover_linears(
        SmallDenoiser(
            Small(lambda m, x: after_side_effect(m["b"](x + 1), m["a"](x + 2)) + m["c"](x)),
            (4,),
            {},
        )
    )
    assert [(info.position, info.leaf) for info in found] == [("b", 0), ("c", 1)]


def test_a_layer_that_runs_twice_is_refused():
    with pytest.raises(CheckpointError, match=r"blocks\.0\.a runs more than once") as caught:
        discover_small(lambda m, x: m["a"](m["b"](m["a"](x))))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["dit", "pixart", "sd3", "flux"])
def test_unused_layers_of_the_families(family: str, make_tiny_denoiser: MakeDenoiser):
    found = discover(make_tiny_denoiser(family))
    assert found.unused == UNUSED.get(family, [])
    if found.unused:
        assert found.note == (f"1 layer that no output depends on is left out: {found.unused[0]}.")
    else:
        assert found.note is None


def test_an_untrained_network_has_all_its_layers(tiny_checkpoints: Path):
    """Zero gates and a zero output layer hide every gradient but that of NaN."""
    import diffusers

    checkpoint = open_checkpoint(tiny_checkpoints / "dit")
    model = diffusers.DiTTransformer2DModel(**checkpoint.config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "proj_out" in name or ".norm1.linear" in name:
            parameter.zero_()
    denoiser = make_denoiser(model, checkpoint, ModelSection(checkpoint=""))
    found = discover(denoiser)
    assert len(found.linears) == 14
    assert found.unused == []


def test_flux_without_single_blocks_has_dead_layers(tiny_checkpoints: Path):
    import diffusers

    checkpoint = open_checkpoint(tiny_checkpoints / "flux")
    model = diffusers.FluxTransformer2DModel(**checkpoint.config | {"num_single_layers": 0})
    section = ModelSection(checkpoint="", latent_size=8)
    found = discover(make_denoiser(model.eval().requires_grad_(False), checkpoint, section))
    block = "transformer_blocks.0."
    assert sorted(found.unused) == [
        f"{block}attn.add_q_proj",
        f"{block}attn.to_add_out",
        f"{block}ff_context.net.0.proj",
        f"{block}ff_context.net.2",
    ]
    assert found.note is not None
    assert found.note.startswith("4 layers that no output depends on are left out: ")
    names = {info.name for info in found.linears}
    assert f"{block}attn.add_k_proj" in names
    assert not names & set(found.unused)


@pytest.mark.parametrize(
    ("family", "changes", "word"),
    [
        ("flux", {"axes_dims_rope": [8, 12, 10]}, "axes_dims_rope [8, 12, 10]"),
        (
            "pixart",
            {"num_attention_heads": 2, "attention_head_dim": 20, "cross_attention_dim": 40},
            "attention_head_dim 20",
        ),
    ],
)
def test_a_network_that_cannot_run_is_one_line(
    family: str, changes: dict[str, Any], word: str, tiny_checkpoints: Path
):
    import diffusers

    checkpoint = open_checkpoint(tiny_checkpoints / family)
    model = getattr(diffusers, checkpoint.class_name)(**checkpoint.config | changes)
    denoiser = make_denoiser(model, checkpoint, ModelSection(checkpoint="", latent_size=8))
    with pytest.raises(CheckpointError, match="can be built but not run") as caught:
        discover_linears(denoiser)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_running_out_of_memory_is_no_fault_of_the_configuration():
    def run_out(_layers: Any, _x: Tensor) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(RuntimeError, match="can't allocate"):
        discover_small(run_out)


def test_discovery_leaves_no_hooks_and_changes_no_output(make_tiny_denoiser: MakeDenoiser):
    denoiser = make_tiny_denoiser("dit")
    inputs = list(denoiser.make_example_inputs(2, seed=0).values())
    before = denoiser(*inputs)
    discover_linears(denoiser)
    assert not any(module._forward_pre_hooks for module in denoiser.modules())
    assert not any(module._forward_hooks for module in denoiser.modules())
    assert not any(parameter.grad is not None for parameter in denoiser.parameters())
    assert torch.equal(denoiser(*inputs), before)
