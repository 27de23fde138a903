from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from treeq_export.errors import FormatError, RecipeError
from treeq_export.model.checkpoint import open_checkpoint
from treeq_export.model.layers import LinearInfo, discover_linears
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import PLAN_FILE, Plan, load_plan
from treeq_export.recipe import Recipe
from treeq_export.search.stage import run_search, select_linears

Make = Callable[..., Any]


@pytest.fixture
def search(
    make_tiny_denoiser: Callable[..., Denoiser],
    make_tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
) -> Callable[..., Plan]:
    """A function: fields of the search section -> the plan of the tiny DiT, in tmp_path."""

    def run(on_step: Callable[[float], None] = lambda _: None, **fields: Any) -> Plan:
        recipe = make_tiny_recipe("dit", **fields)
        checkpoint = open_checkpoint(Path(recipe.model.checkpoint))
        return run_search(tmp_path, make_tiny_denoiser("dit"), checkpoint, recipe, on_step)

    return run


def make_linears(*names: str) -> list[LinearInfo]:
    return [LinearInfo(name, 8, 8, has_bias=True, block=0, position=name, leaf=0) for name in names]


def test_plan_is_written_without_tensors(
    search: Make,
    tmp_path: Path,
    make_tiny_denoiser: Callable[..., Denoiser],
    tiny_checkpoints: Path,
):
    steps: list[float] = []
    plan = search(steps.append, weight_bits=3, activation_bits=8)
    denoiser = make_tiny_denoiser("dit")
    linears = discover_linears(denoiser)
    assert len(linears) == 14
    assert [layer.name for layer in plan.layers] == [linear.name for linear in linears]
    assert [layer.tree.leaf for layer in plan.layers] == [linear.leaf for linear in linears]
    assert {layer.weight.bits for layer in plan.layers} == {3}
    assert {layer.activation.scale for layer in plan.layers} == {"token_absmax"}
    assert plan.average_weight_bits == 3
    assert plan.average_activation_bits == 8
    assert plan.tensors_sha256 is None
    assert plan.model.model_dump() == {
        "name": "tiny-dit",
        "class_name": "DiTTransformer2DModel",
        "num_parameters": sum(p.numel() for p in denoiser.model.parameters()),
    }
    assert plan.strategy.name == "uniform"
    assert plan.strategy.options["weight_bits"] == 3
    assert steps[-1] == 1.0
    assert load_plan(tmp_path, open_checkpoint(tiny_checkpoints / "dit").sha256) == plan


def test_same_recipe_same_bytes(search: Make, tmp_path: Path):
    search()
    first = (tmp_path / PLAN_FILE).read_bytes()
    search()
    assert (tmp_path / PLAN_FILE).read_bytes() == first
    search(weight_bits=5)
    assert (tmp_path / PLAN_FILE).read_bytes() != first


def test_excluded_layers_are_not_in_the_plan(search: Make):
    plan = search(exclude=["*.norm1.linear", "transformer_blocks.1.attn1.*"])
    names = [layer.name for layer in plan.layers]
    assert len(names) == 14 - 2 - 4
    assert not [name for name in names if "norm1" in name or ".1.attn1" in name]


def test_select_keeps_the_order():
    linears = make_linears("b.0.x", "b.0.y", "b.1.x", "b.1.y")
    assert select_linears(linears, []) == linears
    assert select_linears(linears, ["*.y", "b.0.y"]) == [linears[0], linears[2]]
    # Patterns match whole names, and upper case is another name.
    for pattern in ("y", "B.0.*"):
        with pytest.raises(RecipeError, match="matches none"):
            select_linears(linears, [pattern])


def test_pattern_that_matches_nothing_is_an_error(search: Make, tmp_path: Path):
    message = r"search\.exclude: 'blocks\.\*\.fc9' matches none of 14 layers, such as transformer_"
    with pytest.raises(RecipeError, match=message):
        search(exclude=["*.norm1.linear", "blocks.*.fc9"])
    assert not (tmp_path / PLAN_FILE).exists()


def test_pattern_that_matches_everything_is_an_error(search: Make, tmp_path: Path):
    with pytest.raises(RecipeError, match="leaves no layer"):
        search(exclude=["*"])
    assert not (tmp_path / PLAN_FILE).exists()


def test_format_that_does_not_fit_writes_nothing(search: Make, tmp_path: Path):
    with pytest.raises(FormatError, match=r"^transformer_blocks\.0\.norm1\.linear: group_size 48"):
        search(group_size=48)
    assert not (tmp_path / PLAN_FILE).exists()
