"""Costs and budgets: against a count by hand and against what a plan says of itself."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treeq_export.errors import RecipeError
from treeq_export.plan import FORMAT_VERSION, ModelRecord, Plan, StrategyRecord
from treeq_export.quant.spec import BranchFormat
from treeq_export.recipe import SearchSection
from treeq_export.search.budget import Budget, Cost, CostModel, make_budget
from treeq_export.search.formats import assign
from treeq_export.search.network import Network
from treeq_export.search.strategies.uniform import spread_bits, uniform_configuration

MakeNetwork = Callable[..., Network]
# Weights of one block of the network made by hand: adaLN, q/k/v, out, fc1, fc2.
WEIGHTS = [96, 192, 64, 256, 256]


def make_section(**fields: Any) -> SearchSection:
    default = {"strategy": "tss", "branch": None, "rotation_group": 8}
    return SearchSection.model_validate(default | fields)


def test_costs_are_counted_by_hand(make_network: MakeNetwork):
    branches = {"blocks.0.fc1": BranchFormat(b_in=2, b_out=1, rank=3)}
    costs = CostModel(replace(make_network(1), branches=branches), make_section())
    cost = costs.cost(((2, 3), (3, 4)))
    assert cost.weight_bits == 2 * 96 + 3 * 192
    assert cost.activation_bits == 3 * 96 + 4 * 192
    # K = 8 is padded to one word per plane; one scale per output channel.
    assert cost.size_bytes == 4 * (2 * 12 + 12) + 3 * 4 * (3 * 8 + 8)
    assert cost.average_weight_bits == (2 * 96 + 3 * 192) / 288
    with_branch = costs.cost(((4, 4),), 3)
    assert with_branch.size_bytes == 4 * (4 * 32 + 32 + 3 * (32 * 2 + 8))
    assert costs.cost(((4, 4),), 4).size_bytes == 4 * (4 * 8 * 1 + 8)


def test_groups_cost_a_scale_each(make_network: MakeNetwork):
    costs = CostModel(make_network(1), make_section(group_size=4))
    assert costs.cost(((2, 2),)).size_bytes == 4 * (2 * 12 + 12 * 2)


def test_full_precision_costs_float_bits(make_network: MakeNetwork):
    cost = CostModel(make_network(1), make_section()).cost((None,))
    assert cost == Cost(32 * 96, 32 * 96, 4 * 96, 96)


def test_averages_are_those_of_the_plan(make_network: MakeNetwork):
    section, network = make_section(), make_network(2)
    configuration = tuple((2 + at % 4, 2 + at % 3) for at in range(10))
    cost = CostModel(network, section).cost(configuration)
    plan = Plan(
        format_version=FORMAT_VERSION,
        model=ModelRecord(name="m", class_name="c", num_parameters=0),
        checkpoint_sha256="",
        strategy=StrategyRecord(name="tss", options={}),
        layers=assign(network, configuration, section),
    )
    assert plan.average_weight_bits == pytest.approx(cost.average_weight_bits, rel=1e-15)
    assert plan.average_activation_bits == pytest.approx(cost.average_activation_bits, rel=1e-15)


def test_every_limit_has_to_hold(make_network: MakeNetwork):
    section = make_section(
        budget={"weight_bits": 3, "activation_bits": 4, "size_bytes": 3000},
        weight_candidates=[2, 3, 4],
    )
    costs = CostModel(make_network(1), section)
    budget = make_budget(section, costs)
    assert budget.allows(costs.cost(((3, 4),) * 5))
    assert not budget.allows(costs.cost(((4, 4),) * 5))
    assert not budget.allows(costs.cost(((3, 6),) * 5))
    assert not Budget(None, None, 10).allows(costs.cost(((3, 4),) * 5))
    assert budget.fractions(costs.cost(((3, 2),) * 5))[:2] == [1.0, 0.5]
    assert budget.fractions(costs.cost(((2, 6),), 0))[1] == pytest.approx(1.5 * 96 / 864)
    weights, activations = budget.relative(costs.cost(((3, 3),) * 5))
    assert weights == 1.0  # the bits are closer to their limit than the size
    assert activations == 0.75


def test_a_node_spends_its_share(make_network: MakeNetwork):
    section = make_section(budget={"weight_bits": 3.0})
    costs = CostModel(make_network(1), section)
    budget = make_budget(section, costs)
    for first in range(5):
        assert budget.relative(costs.cost(((3, 2),), first)) == pytest.approx([1.0])
        assert budget.relative(costs.cost(((6, 6),), first)) == pytest.approx([2.0])
    section = make_section(budget={"activation_bits": 4.0})
    budget = make_budget(section, CostModel(make_network(1), section))
    assert budget.relative(costs.cost(((6, 2),), 3)) == pytest.approx([0.5])


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (None, "search.budget: missing, expected by strategy tss. Set at least one of"),
        ({}, "search.budget: missing"),
        ({"weight_bits": 2.5}, "search.budget.weight_bits: received 2.5, expected at least 3"),
        ({"activation_bits": 2}, "search.budget.activation_bits: received 2, expected at least 4"),
        ({"size_bytes": 100}, "search.budget.size_bytes: received 100, expected at least "),
    ],
)
def test_what_no_candidate_can_meet(budget: Any, message: str, make_network: MakeNetwork):
    section = make_section(budget=budget, weight_candidates=[3, 4], activation_candidates=[4])
    with pytest.raises(RecipeError, match=f"^{message}"):
        make_budget(section, CostModel(make_network(1), section))


@given(average=st.floats(2, 8), num_blocks=st.integers(1, 6))
def test_uniform_bits_are_two_neighbours_below_the_average(
    average: float, num_blocks: int, make_network: MakeNetwork
):
    leaves = make_network(num_blocks).leaves
    bits = spread_bits(leaves, average)
    assert set(bits) <= {int(average), int(average) + 1}
    weights = [leaf.num_weights for leaf in leaves]
    reached = sum(b * n for b, n in zip(bits, weights, strict=True)) / sum(weights)
    # One more raised leaf of the largest size would exceed it, or nearly.
    assert reached <= average + 1e-9
    assert average - reached <= 2 * max(weights) / sum(weights)


def test_uniform_bits_of_given_widths(make_network: MakeNetwork):
    network = make_network(4)
    leaves = network.leaves
    bits = spread_bits(leaves, 3.0, [2, 4])
    assert set(bits) == {2, 4}
    weights = [leaf.num_weights for leaf in leaves]
    assert sum(b * n for b, n in zip(bits, weights, strict=True)) <= 3 * sum(weights)
    assert spread_bits(leaves, 7.5, [2, 4]) == [4] * 20
    section = make_section(budget={"weight_bits": 3.0}, activation_bits=2)
    costs = CostModel(network, section)
    configuration = uniform_configuration(costs, section, ([2, 4], [3, 6]))
    assert {pair[1] for pair in configuration if pair} == {3}


def test_uniform_bits_are_spread_over_the_network(make_network: MakeNetwork):
    bits = spread_bits(make_network(6).leaves, 2.5)
    by_block = [sum(bits[5 * b : 5 * b + 5]) for b in range(6)]
    assert max(by_block) - min(by_block) <= 2
    assert spread_bits(make_network(6).leaves, 3.0) == [3] * 30
    assert spread_bits(make_network(6).leaves, 8.0) == [8] * 30


def test_uniform_at_a_size_takes_the_most_bits_that_fit(make_network: MakeNetwork):
    network = make_network(2)
    section = make_section(strategy="uniform", budget={"size_bytes": 2400}, activation_bits=5)
    costs = CostModel(network, section)
    configuration = uniform_configuration(costs, section)
    assert {pair[1] for pair in configuration if pair} == {5}
    assert costs.cost(configuration).size_bytes <= 2400
    raised = tuple((pair[0] + 1, 5) for pair in configuration if pair)
    assert costs.cost(raised).size_bytes > 2400


def test_uniform_at_a_size_that_nothing_fits(make_network: MakeNetwork):
    section = make_section(strategy="uniform", budget={"size_bytes": 50})
    network = make_network(1)
    with pytest.raises(RecipeError, match=r"size_bytes: received 50, expected at least \d+, which"):
        uniform_configuration(CostModel(network, section), section)


def test_uniform_takes_the_recipes_bits_where_there_is_no_limit(make_network: MakeNetwork):
    section = make_section(
        strategy="uniform", budget={"activation_bits": 3}, weight_bits=5, activation_bits=None
    )
    network = make_network(1)
    costs = CostModel(network, section)
    assert uniform_configuration(costs, section) == ((5, 3),) * 5
