"""Spreads over the seeds, and rows made of them."""

import math

import pytest

from treeq_export.compare.rows import count_evaluations, make_ratio, make_spread, score_fields
from treeq_export.records import (
    QualityRecord,
    QualityScores,
    SearchCost,
    SearchRecord,
    SeedQuality,
)


def make_scores(distance: float | None, psnr: float | None = None) -> QualityScores:
    return QualityScores(frechet_distance=distance, class_accuracy=0.5, psnr_db=psnr)


class TestSpread:
    def test_mean_and_sample_deviation(self) -> None:
        spread = make_spread([1.0, 2.0, 6.0])
        assert spread is not None
        assert (spread.mean, spread.values) == (3.0, [1.0, 2.0, 6.0])
        assert spread.std == pytest.approx(math.sqrt((4 + 1 + 9) / 2))

    def test_one_seed_has_no_deviation(self) -> None:
        spread = make_spread([4.0])
        assert spread is not None
        assert (spread.mean, spread.std) == (4.0, None)

    def test_infinite_psnr_has_no_deviation(self) -> None:
        spread = make_spread([math.inf, 30.0])
        assert spread is not None
        assert (spread.mean, spread.std) == (math.inf, None)

    @pytest.mark.parametrize("values", [[], [None], [1.0, None]])
    def test_what_was_not_measured(self, values: list[float | None]) -> None:
        assert make_spread(values) is None

    def test_ratio_is_that_of_the_means(self) -> None:
        ratio = make_ratio(make_spread([2.0, 4.0]), make_spread([1.0, 4.0]))
        assert ratio is not None
        assert ratio.mean == pytest.approx(6 / 5)
        assert ratio.values == [2.0, 1.0]
        assert ratio.std == pytest.approx(math.sqrt(0.5))

    def test_no_ratio_to_nothing(self) -> None:
        one = make_spread([1.0])
        assert make_ratio(one, None) is None
        assert make_ratio(None, one) is None
        assert make_ratio(one, make_spread([0.0])) is None


def test_scores_of_a_row() -> None:
    pairs = [(1.0, 1.5, 20.0), (2.0, 2.5, 22.0)]
    quality = QualityRecord(
        num_samples=10,
        runner="torch",
        conditioning="labels",
        seeds=[
            SeedQuality(seed=at, fp=make_scores(fp), quantized=make_scores(ours, psnr))
            for at, (fp, ours, psnr) in enumerate(pairs)
        ],
        fp=make_scores(1.5),
        quantized=make_scores(2.0, 21.0),
        grids={},
        gates=[],
        network_mse=0.25,
    )
    fields = score_fields(quality)
    assert fields["network_mse"] == 0.25
    assert fields["frechet_distance"].mean == 2.0
    assert fields["frechet_ratio"].mean == pytest.approx(2.0 / 1.5)
    assert fields["class_accuracy"].mean == 0.5
    assert fields["psnr_db"].values == [20.0, 22.0]


def test_evaluations_are_those_of_all_processes() -> None:
    cost = SearchCost(
        num_leaves=1, num_merges=0, num_evaluations=9, num_block_runs=9, estimate_s=None
    )
    record = SearchRecord(
        strategy="tss",
        noise=1.0,
        budget={},
        cost=cost,
        num_measured=7,
        num_from_journal=3,
        seconds=1.0,
        network_mse=0.1,
        nodes=[],
        front=[],
        branches={},
    )
    assert count_evaluations(record) == 10
    assert count_evaluations(record.model_copy(update={"cost": None})) == 10  # a baseline
    nothing = {"num_measured": 0, "num_from_journal": 0}
    assert count_evaluations(record.model_copy(update=nothing)) is None
    assert count_evaluations(None) is None
