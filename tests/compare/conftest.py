"""A comparison made by hand: four strategies, two budgets, one trained variant, one peer."""

from collections.abc import Callable

import pytest

from treeq_export import __version__
from treeq_export.compare.rows import make_ratio, make_spread
from treeq_export.records import CompareRecord, CompareRow, SearchPoint

FP_DISTANCES = (0.34, 0.24, 0.42)
# Network MSE at 3 bits; at 4 bits it is an eighth.
ERRORS = {"uniform": 8e-3, "tss": 4e-3, "integer_programming": 5e-3, "greedy": 6e-3}


def make_points() -> list[SearchPoint]:
    return [
        SearchPoint(
            weight_bits=2.5 + 0.1 * at,
            activation_bits=2.5 + 0.1 * at,
            size_bytes=1000 + at,
            mse=2e-2 * 0.8**at * (1 if at % 3 else 1.5),
            kept=at % 3 != 0,
            chosen=at == 5,
        )
        for at in range(16)
    ]


@pytest.fixture
def make_compare_row() -> Callable[..., CompareRow]:
    """A function: strategy, budget, fields to replace -> a row."""

    def make(strategy: str, budget: float | None, **changes: object) -> CompareRow:
        bits = 8.0 if budget is None else budget
        error = ERRORS.get(strategy, 5.0) / 8 ** (bits - 3)
        seeds = zip((0.8, 1.0, 1.4), FP_DISTANCES, strict=True)
        distance = make_spread([value * (1 + factor * 200 * error) for factor, value in seeds])
        fields = {
            "name": f"{strategy}-{bits:g}",
            "strategy": strategy,
            "variant": "ptq",
            "peer": False,
            "description": "",
            "budget": budget,
            "weight_bits": bits,
            "activation_bits": bits,
            "branch_parameter_fraction": 0.087,
            "network_mse": error,
            "frechet_distance": distance,
            "frechet_ratio": make_ratio(distance, make_spread(FP_DISTANCES)),
            "class_accuracy": make_spread([0.99, 0.98, 0.97]),
            "psnr_db": make_spread([30.0, 31.0, 32.0]),
            "seconds": {"search": 1.5, "calibrate": 20.0, "evaluate": 60.0},
            "num_evaluations": None if strategy == "uniform" else 1234,
            "front": make_points() if strategy == "tss" else [],
        }
        return CompareRow.model_validate(fields | changes)

    return make


@pytest.fixture
def comparison(make_compare_row: Callable[..., CompareRow]) -> CompareRecord:
    """Every kind of row, two cells still to come."""
    rows = [make_compare_row(name, budget) for name in ERRORS for budget in (3.0, 4.0)]
    trained = {
        "name": "tss-3-peft",
        "variant": "peft",
        "network_mse": 2.5e-3,
        "seconds": {"search": 1.5, "calibrate": 20.0, "finetune": 130.0},
    }
    rows.append(make_compare_row("tss", 3.0, **trained))
    rows.append(
        make_compare_row(
            "modelopt_int8_max",
            None,
            name="peer-modelopt_int8_max",
            peer=True,
            description="W8A8",
            front=[],
            num_evaluations=None,
        )
    )
    return CompareRecord(
        version=__version__,
        name="tiny",
        checkpoint_sha256="5f" * 32,
        recipe={"search": {"rotation_group": 32}, "seed": 0},
        num_samples=100,
        seeds=[0, 1, 2],
        conditioning="labels",
        fp_frechet_distance=make_spread(FP_DISTANCES),
        fp_class_accuracy=make_spread([0.99, 0.99, 0.99]),
        rows=rows,
        pending=["greedy-3.5", "tss-3.5"],
        environment={"cpu": "Test CPU", "cores": 2},
    )
