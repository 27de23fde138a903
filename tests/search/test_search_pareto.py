"""The Pareto drop against brute force."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from treeq_export.search.pareto import crowding_distance, drop, sort_fronts, thin_evenly

# Few distinct values, so that ties and duplicates are common.
POINTS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=40)


def split(points: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    cost, error = np.array(points, dtype=np.float64).T
    return cost, error


def dominates(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other


@given(POINTS)
def test_fronts_are_those_of_brute_force(points: list[tuple[int, int]]):
    fronts = sort_fronts(*split(points))
    assert sorted(index for front in fronts for index in front) == list(range(len(points)))
    rest = set(range(len(points)))
    for front in fronts:
        best = {i for i in rest if not any(dominates(points[j], points[i]) for j in rest)}
        # Of equal points one is in this front, the next in the following one.
        assert {points[i] for i in front} == {points[i] for i in best}
        assert len(front) == len({points[i] for i in best})
        costs = [points[i][0] for i in front]
        assert costs == sorted(costs)
        rest -= set(front)


def test_a_nan_counts_as_an_infinite_error():
    fronts = sort_fronts(np.array([1.0, 1.0, 2.0]), np.array([np.nan, 5.0, 1.0]))
    assert fronts == [[1, 2], [0]]
    assert sort_fronts(np.array([0.0, 1.0]), np.array([np.nan, np.inf])) == [[0], [1]]


@given(POINTS, st.integers(2, 12))
def test_the_drop_keeps_the_front_and_both_its_ends(points: list[tuple[int, int]], keep: int):
    costs, errors = split(points)
    kept = drop(list(costs), list(errors), keep)
    assert len(kept) == min(keep, len(points)) == len(set(kept))
    assert [costs[i] for i in kept] == sorted(costs[i] for i in kept)
    first = sort_fronts(costs, errors)[0]
    assert {first[0], first[-1]} <= set(kept)
    if len(first) <= keep:
        assert set(first) <= set(kept)
    else:
        assert set(kept) <= set(first)


def test_a_long_front_is_thinned_evenly_in_cost():
    costs = [float(i) for i in range(101)]
    kept = drop(costs, [100.0 - i for i in range(101)], 5)
    assert kept == [0, 25, 50, 75, 100]


def test_thinning_never_takes_a_point_twice():
    assert thin_evenly(np.array([0.0, 0.01, 0.02, 10.0]), 3) == [0, 2, 3]
    assert thin_evenly(np.array([1.0, 2.0]), 5) == [0, 1]


def test_a_short_front_is_filled_by_crowding_distance():
    # Front: (0, 10), (10, 0). Second front: (1, 11), (5, 6), (5.1, 5.9), (11, 1).
    costs = [0.0, 10.0, 1.0, 5.0, 5.1, 11.0]
    errors = [10.0, 0.0, 11.0, 6.9, 6.8, 1.0]
    front = sort_fronts(np.array(costs), np.array(errors))
    assert front == [[0, 3, 4, 1], [2, 5]]
    errors[3], errors[4] = 10.5, 10.4
    assert sort_fronts(np.array(costs), np.array(errors)) == [[0, 1], [2, 3, 4, 5]]
    # The ends come first, then the one in the emptier place.
    assert drop(costs, errors, 4) == [0, 2, 1, 5]
    assert drop(costs, errors, 5) == [0, 2, 4, 1, 5]


def test_crowding_distance_by_hand():
    distance = crowding_distance(np.array([0.0, 1.0, 4.0]), np.array([3.0, 2.0, 0.0]))
    assert distance.tolist() == [np.inf, 2.0, np.inf]
    assert crowding_distance(np.array([1.0]), np.array([1.0])).tolist() == [np.inf]
    same = crowding_distance(np.array([1.0, 1.0, 1.0]), np.array([2.0, 2.0, np.inf]))
    assert same[1] < np.inf
