"""The Pareto drop against brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treeq_export.search.strategies.pareto import crowding_distance, drop, sort_fronts

# Few distinct values, so that ties and duplicates are common.
COSTS = st.integers(0, 6)
POINTS = st.lists(st.tuples(COSTS, COSTS, COSTS), min_size=1, max_size=40)
Point = tuple[int, int, int]


def split(points: list[Point], num_costs: int) -> tuple[np.ndarray, np.ndarray]:
    """Costs (n, c) and errors (n,)."""
    values = np.array(points, dtype=np.float64)
    return values[:, :num_costs], values[:, 2]


def dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


@given(POINTS, st.sampled_from([1, 2]))
def test_fronts_are_those_of_brute_force(points: list[Point], num_costs: int):
    costs, errors = split(points, num_costs)
    values = [(*cost, error) for cost, error in zip(costs.tolist(), errors.tolist(), strict=True)]
    fronts = sort_fronts(costs, errors)
    assert sorted(index for front in fronts for index in front) == list(range(len(points)))
    rest = set(range(len(points)))
    for front in fronts:
        best = {i for i in rest if not any(dominates(values[j], values[i]) for j in rest)}
        # Of equal points one is in this front, the next in the following one.
        assert {values[i] for i in front} == {values[i] for i in best}
        assert len(front) == len({values[i] for i in best})
        sums = [costs[i].sum() for i in front]
        assert sums == sorted(sums)
        rest -= set(front)


def test_a_nan_counts_as_an_infinite_error():
    costs = np.array([[1.0], [1.0], [2.0]])
    assert sort_fronts(costs, np.array([np.nan, 5.0, 1.0])) == [[1, 2], [0]]
    assert sort_fronts(costs[1:], np.array([np.nan, np.inf])) == [[0], [1]]


@given(POINTS, st.sampled_from([1, 2]), st.integers(2, 12))
def test_the_drop_keeps_the_front_and_both_its_ends(points: list[Point], num_costs: int, keep: int):
    costs, errors = split(points, num_costs)
    kept = drop(costs, errors, keep, np.ones(num_costs), np.ones(num_costs), num_leaves=4)
    assert len(kept) == min(keep, len(points)) == len(set(kept))
    sums = [costs[i].sum() for i in kept]
    assert sums == sorted(sums)
    assert costs[kept].sum(axis=1).min() == costs.sum(axis=1).min()
    first = sort_fronts(costs, errors)[0]
    if len(first) <= keep:
        assert set(first) <= set(kept)
    else:
        assert set(kept) <= set(first)
        assert errors[kept].min() == errors.min()


def convex_front(number: int) -> tuple[np.ndarray, np.ndarray]:
    costs = np.linspace(0.5, 2.0, number)[:, None]
    return costs, 4.0 ** -costs[:, 0]


@pytest.mark.parametrize("num_leaves", [1, 4, 16])
@pytest.mark.parametrize("share", [0.7, 1.0])
def test_a_long_front_is_kept_around_the_share(num_leaves: int, share: float):
    costs, errors = convex_front(1501)
    kept = costs[drop(costs, errors, 16, np.array([share]), np.ones(1), num_leaves)][:, 0]
    assert kept[0] == 0.5
    assert kept[-1] == 2.0
    reach = 0.2 * share / np.sqrt(num_leaves)
    inside = kept[1:-1]
    assert share - reach - 0.01 < inside.min() < share - 0.6 * reach
    assert share + 0.6 * reach < inside.max() <= share + reach + 0.01
    assert np.median(inside) == pytest.approx(share, abs=reach / 4)


def plane(share: tuple[float, float], prices: tuple[float, float]) -> np.ndarray:
    """The kept costs of a convex front of two costs."""
    grid = np.linspace(0.5, 2.0, 61)
    costs = np.array([(x, y) for x in grid for y in grid])
    errors = 4.0 ** -costs[:, 0] + 4.0 ** -costs[:, 1]
    return costs[drop(costs, errors, 16, np.array(share), np.array(prices), num_leaves=4)]


def test_with_two_costs_points_on_all_sides_of_the_share_are_kept():
    kept = plane((1.0, 1.0), (1.0, 1.0))
    sides = {(bool(x > 1), bool(y > 1)) for x, y in kept}
    assert len(sides) == 4
    assert np.median(kept.mean(axis=1)) == pytest.approx(1.0, abs=0.1)


def test_where_one_kind_of_bits_is_dearer_less_is_spent_on_it():
    even, dear = plane((1.0, 1.0), (1.0, 1.0)), plane((1.0, 1.0), (3.0, 1.0))
    assert np.median(dear[:, 0]) < np.median(even[:, 0]) - 0.1
    assert np.median(dear[:, 1]) > np.median(even[:, 1]) + 0.1


def test_prices_of_zero_count_alike():
    assert np.array_equal(plane((1.0, 1.0), (0.0, 0.0)), plane((1.0, 1.0), (1.0, 1.0)))


def test_a_share_below_every_point_keeps_the_cheapest():
    costs, errors = convex_front(100)
    kept = drop(costs * 3, errors, 4, np.ones(1), np.ones(1), num_leaves=1)
    assert kept[0] == 0
    assert len(kept) == 4


def test_a_short_front_is_filled_by_crowding_distance():
    # The ends of the second front come first, then the one in the emptier place.
    costs = np.array([[0.0], [10.0], [1.0], [5.0], [5.1], [11.0]])
    errors = np.array([10.0, 0.0, 11.0, 10.5, 10.4, 1.0])
    assert sort_fronts(costs, errors) == [[0, 1], [2, 3, 4, 5]]
    assert drop(costs, errors, 4, np.ones(1), np.ones(1), 1) == [0, 2, 1, 5]
    assert drop(costs, errors, 5, np.ones(1), np.ones(1), 1) == [0, 2, 4, 1, 5]


def test_crowding_distance_by_hand():
    costs = np.array([[0.0], [1.0], [4.0]])
    assert crowding_distance(costs, np.array([3.0, 2.0, 0.0])).tolist() == [np.inf, 2.0, np.inf]
    assert crowding_distance(costs[:1], np.array([1.0])).tolist() == [np.inf]
    same = crowding_distance(np.ones((3, 2)), np.array([2.0, 2.0, np.inf]))
    assert np.isfinite(same).sum() == 0 or np.isfinite(same).any()
