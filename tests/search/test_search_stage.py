import json
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from treeq_export.errors import FormatError, RecipeError
from treeq_export.model.checkpoint import open_checkpoint
from treeq_export.model.layers import LinearInfo, discover_linears
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import Plan, load_plan
from treeq_export.recipe import Recipe
from treeq_export.records import SearchRecord, load_record
from treeq_export.run_folder import RunFolder
from treeq_export.search.branches import nominal_bits
from treeq_export.search.network import select_linears
from treeq_export.search.stage import estimate_search, run_search

Make = Callable[..., Any]

SEARCHED: dict[str, Any] = {
    "strategy": "tss",
    "budget": {"weight_bits": 3.0, "activation_bits": 3.0},
    "weight_candidates": [2, 4],
    "activation_candidates": [2, 4],
    "keep": 4,
    "num_rows": 4,
    "num_samples": 2,
}
# What a search with these settings measures in the tree: see tests/search/test_search_tree.py.
NUM_TREE = 9 * 16 + 10 * (4 + 1)


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
    first = (tmp_path / RunFolder.PLAN).read_bytes()
    search()
    assert (tmp_path / RunFolder.PLAN).read_bytes() == first
    search(weight_bits=5)
    assert (tmp_path / RunFolder.PLAN).read_bytes() != first


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
    assert not (tmp_path / RunFolder.PLAN).exists()


def test_pattern_that_matches_everything_is_an_error(search: Make, tmp_path: Path):
    with pytest.raises(RecipeError, match="leaves no layer"):
        search(exclude=["*"])
    assert not (tmp_path / RunFolder.PLAN).exists()


def test_format_that_does_not_fit_writes_nothing(search: Make, tmp_path: Path):
    with pytest.raises(FormatError, match=r"^transformer_blocks\.0\.norm1\.linear: group_size 48"):
        search(group_size=48)
    assert not (tmp_path / RunFolder.PLAN).exists()


def record_of(run: Path) -> SearchRecord:
    return load_record(run / RunFolder.SEARCH, SearchRecord, "search")


def test_uniform_measures_nothing(search: Make, tmp_path: Path):
    search()
    record = record_of(tmp_path)
    assert record.strategy == "uniform"
    assert record.cost is None
    assert record.num_measured == 0
    assert record.network_mse is None
    assert record.nodes == record.front == []
    assert not (tmp_path / "search").exists()


def test_the_tree_search_writes_what_it_did(search: Make, tmp_path: Path):
    steps: list[float] = []
    threads = torch.get_num_threads()
    plan = search(steps.append, **SEARCHED, noise=0.5)
    assert torch.get_num_threads() == threads
    assert plan.average_weight_bits <= 3
    assert plan.average_activation_bits <= 3
    assert len({layer.weight.bits for layer in plan.layers}) == 2
    by_leaf = {layer.tree.leaf: (layer.weight, layer.activation) for layer in plan.layers}
    assert all(by_leaf[x.tree.leaf] == (x.weight, x.activation) for x in plan.layers)
    record = record_of(tmp_path)
    assert (record.strategy, record.noise) == ("tss", 0.5)
    assert record.budget == {"weight_bits": 3.0, "activation_bits": 3.0}
    assert record.cost is not None
    assert record.cost.num_evaluations == NUM_TREE
    assert record.num_measured > NUM_TREE  # refinement comes on top
    assert record.num_from_journal == 0
    assert record.nodes[0].name == "blocks 0..1"
    assert record.nodes[0].weight_bits == pytest.approx(plan.average_weight_bits)
    assert sum(node.depth == 0 for node in record.nodes) == 1
    chosen = [point for point in record.front if point.chosen]
    assert [point.mse for point in chosen] == [record.network_mse]
    assert chosen[0].weight_bits == pytest.approx(plan.average_weight_bits)
    assert steps == sorted(steps)
    assert steps[-1] == 1.0


def test_what_is_known_is_not_measured_again(search: Make, tmp_path: Path):
    plan = search(**SEARCHED)
    first = record_of(tmp_path)
    assert search(**SEARCHED) == plan
    again = record_of(tmp_path)
    assert (again.num_measured, again.num_from_journal) == (0, first.num_measured)
    assert again.network_mse == first.network_mse
    assert again.front == first.front
    # Another environment is another question; without noise the budget is no part of it.
    search(**SEARCHED | {"noise": 0.0})
    assert record_of(tmp_path).num_from_journal == 0
    search(**SEARCHED | {"noise": 0.0, "budget": {"weight_bits": 2.5}})
    assert record_of(tmp_path).num_from_journal > 0


@pytest.mark.parametrize("strategy", ["integer_programming", "greedy"])
def test_baselines_share_budget_and_journal(strategy: str, search: Make, tmp_path: Path):
    plan = search(**SEARCHED | {"strategy": strategy})
    assert plan.average_weight_bits <= 3
    assert plan.average_activation_bits <= 3
    record = record_of(tmp_path)
    assert record.network_mse is not None
    assert record.nodes == record.front == []
    search(**SEARCHED | {"strategy": strategy})
    assert record_of(tmp_path).num_measured == 0


def test_a_search_of_some_blocks_measures_on_the_whole_network(search: Make, tmp_path: Path):
    plan = search(**SEARCHED, exclude=["transformer_blocks.1.*"])
    assert {layer.tree.block for layer in plan.layers} == {0}
    assert record_of(tmp_path).network_mse is not None


def test_refinement_and_calibration_can_be_left_out(search: Make, tmp_path: Path):
    search(**SEARCHED, refine=None, calibrated_finalists=0)
    record = record_of(tmp_path)
    # The four best of the root, and what is best if errors added up, if it is not one of them.
    assert record.num_measured - NUM_TREE in (4, 5, 6)
    assert [finalist.chosen for finalist in record.finalists].count(True) == 1
    assert record.finalists[0].chosen
    assert {finalist.calibrated_mse for finalist in record.finalists} == {None}


def test_finalists_are_calibrated_before_the_last_choice(search: Make, tmp_path: Path):
    plan = search(**SEARCHED, calibrated_finalists=2)
    finalists = record_of(tmp_path).finalists
    assert len(finalists) in (2, 3, 4)
    best = min(finalists, key=lambda x: x.calibrated_mse or math.inf)
    assert [x.chosen for x in finalists] == [x is best for x in finalists]
    assert best.weight_bits == pytest.approx(plan.average_weight_bits)
    # The tiny recipe calibrates each layer on clean inputs, as the search has fitted it.
    assert [x.calibrated_mse for x in finalists] == pytest.approx(
        [x.final_mse for x in finalists], rel=1e-3
    )


def test_branches_are_chosen_by_output_error(search: Make, tmp_path: Path):
    budget = {"parameter_fraction": 0.15, "grids": 2}
    plan = search(branch_budget=budget, weight_bits=3, activation_bits=4)
    record = record_of(tmp_path)
    assert set(record.branches) == {layer.name for layer in plan.layers}
    for layer in plan.layers:
        trials = record.branches[layer.name]
        assert [trial["error"] for trial in trials] == sorted(trial["error"] for trial in trials)
        assert layer.branch is not None
        best = {key: trials[0][key] for key in ("b_in", "b_out", "rank")}
        assert layer.branch.model_dump() == best
        shapes = {(trial["b_in"], trial["b_out"]) for trial in trials}
        assert shapes == {(1, 1), (1, 2), (2, 1), (2, 2)}
        limit = 0.15 * layer.num_weights
        assert all(0 < trial["num_parameters"] <= limit for trial in trials)
        assert all(0 < trial["error"] < 1 for trial in trials)
    assert plan.branch_parameter_fraction <= 0.15


def test_a_budget_too_small_for_any_branch_leaves_it_out(search: Make):
    plan = search(branch_budget={"parameter_fraction": 0.001})
    assert {layer.branch for layer in plan.layers} == {None}


def test_nominal_bits_are_those_of_the_budget(make_tiny_recipe: Callable[..., Recipe]):
    def bits(**fields: Any) -> tuple[int, int]:
        return nominal_bits(make_tiny_recipe("dit", **fields).search)

    assert bits(weight_bits=5, activation_bits=6) == (5, 6)
    assert bits(activation_bits=None) == (4, 8)
    assert bits(budget={"weight_bits": 2.6, "activation_bits": 3.2}) == (3, 3)
    assert bits(budget={"size_bytes": 1000}) == (4, 4)


def test_an_estimate_searches_nothing(
    make_tiny_denoiser: Callable[..., Denoiser],
    make_tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
):
    said: list[str] = []
    recipe = make_tiny_recipe("dit", **SEARCHED)
    checkpoint = open_checkpoint(Path(recipe.model.checkpoint))
    cost = estimate_search(tmp_path, make_tiny_denoiser("dit"), checkpoint, recipe, said.append)
    assert cost.num_evaluations == NUM_TREE
    assert cost.estimate_s is not None
    assert cost.estimate_s > 0
    assert said[0].startswith("search: 10 leaves, 9 merges, 194 evaluations of 4 inputs = ")
    assert list(tmp_path.iterdir()) == []


def test_static_activation_scales_are_fitted_for_every_width(search: Make, tmp_path: Path):
    plan = search(**SEARCHED, activation_scale="tensor_static")
    assert {layer.activation.scale for layer in plan.layers} == {"tensor_static"}


_CHILD = """
import sys
from pathlib import Path
from treeq_export.model.checkpoint import load_model, open_checkpoint
from treeq_export.model.conditioning import make_denoiser
from treeq_export.recipe import Recipe
from treeq_export.search.stage import run_search
recipe = Recipe.model_validate_json(Path(sys.argv[2]).read_bytes())
checkpoint = open_checkpoint(Path(recipe.model.checkpoint))
denoiser = make_denoiser(load_model(checkpoint), checkpoint, recipe.model)
run_search(Path(sys.argv[1]), denoiser, checkpoint, recipe, lambda _: None)
"""


def start_search(run: Path, recipe: Recipe) -> "subprocess.Popen[bytes]":
    run.mkdir(exist_ok=True)
    (run / "recipe.json").write_text(recipe.model_dump_json(by_alias=True))
    return subprocess.Popen([sys.executable, "-c", _CHILD, str(run), str(run / "recipe.json")])


def count_values(run: Path) -> int:
    """Values in the journal of a search that has ended."""
    with closing(sqlite3.connect(run / "search" / "journal.sqlite")) as database:
        return database.execute("SELECT count(*) FROM evaluations").fetchone()[0]


@pytest.mark.slow
def test_a_killed_search_goes_on_and_finds_the_same_plan(
    search: Make, make_tiny_recipe: Callable[..., Recipe], tmp_path: Path
):
    fields = SEARCHED | {"num_rows": 64, "num_samples": 32}
    search(**fields)
    expected, first = (tmp_path / RunFolder.PLAN).read_bytes(), record_of(tmp_path)
    run = tmp_path / "killed"
    recipe = make_tiny_recipe("dit", **fields)
    child = start_search(run, recipe)
    journal = run / "search" / "journal.sqlite-wal"
    while child.poll() is None and not (journal.exists() and journal.stat().st_size > 1 << 16):
        time.sleep(0.005)  # until some values are in it
    time.sleep(random.Random(os.getpid()).uniform(0.0, 0.3))
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the search ended before it was killed"
    assert not (run / RunFolder.PLAN).exists()
    known = count_values(run)
    assert start_search(run, recipe).wait() == 0
    assert (run / RunFolder.PLAN).read_bytes() == expected
    record = record_of(run)
    assert record.num_from_journal >= known > 0
    assert record.num_measured + record.num_from_journal == first.num_measured
    assert count_values(run) == first.num_measured
    assert record.network_mse == first.network_mse


@pytest.mark.slow
def test_ray_workers_find_the_same_plan(
    search: Make, make_tiny_recipe: Callable[..., Recipe], tmp_path: Path
):
    search(**SEARCHED)
    expected, first = (tmp_path / RunFolder.PLAN).read_bytes(), record_of(tmp_path)
    run = tmp_path / "ray"
    assert start_search(run, make_tiny_recipe("dit", **SEARCHED, executor="ray")).wait() == 0
    assert (run / RunFolder.PLAN).read_bytes() == expected
    record = record_of(run)
    assert record.num_measured == first.num_measured
    assert record.network_mse == first.network_mse
    assert json.dumps([p.model_dump() for p in record.front]) == json.dumps(
        [p.model_dump() for p in first.front]
    )
