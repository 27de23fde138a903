"""The table of a comparison as texts: what terminal and HTML both show."""

from dataclasses import dataclass

from treeq_export.records import CompareRecord, CompareRow
from treeq_export.report.quantities import (
    DASH,
    format_count,
    format_fixed,
    format_number,
    format_percent,
    format_ratio,
    format_seconds,
    format_spread,
)

EMULATED = "fake-quantized in PyTorch"
UNIFORM = "uniform"
TIMED = ("search", "calibrate", "finetune")  # stages whose seconds are shown


@dataclass(frozen=True)
class TableRow:
    """One row as texts.

    Attributes:
        row: The record's row.
        texts: The text of every column, by a name of the column.
        first: Whether it is the first row of its budget.
        best: Whether none of its budget has less network MSE, trained and untrained ones apart.
    """

    row: CompareRow
    texts: dict[str, str]
    first: bool
    best: bool


def label_of(row: CompareRow) -> str:
    """Return what a row is called.

    A peer is called by its name, the others by strategy and training.
    """
    if row.peer or row.variant == "ptq":
        return row.strategy
    return f"{row.strategy} + {row.variant.upper()}"


def table_rows(record: CompareRecord) -> list[TableRow]:
    """Return all rows by budget, peers last, otherwise in the record's order."""
    ordered = sorted(record.rows, key=lambda row: (row.peer, row.budget or 0.0))
    groups = [None, *map(_group, ordered)]
    return [
        TableRow(row, _make_texts(record, row), _group(row) != before, _is_best(record, row))
        for before, row in zip(groups, ordered, strict=False)
    ]


def _group(row: CompareRow) -> tuple[bool, float | None]:
    """Return what the rows of one part of the table share."""
    return row.peer, row.budget


def ratio_to_uniform(record: CompareRecord, row: CompareRow) -> float | None:
    """Return a row's network MSE over that of uniform bits at the same budget, untrained both.

    None where one of them was not measured, for peers, and for uniform bits themselves.
    """
    if row.peer or (row.strategy, row.variant) == (UNIFORM, "ptq") or row.network_mse is None:
        return None
    for base in record.rows:
        same = (base.strategy, base.variant, base.budget) == (UNIFORM, "ptq", row.budget)
        if same and base.network_mse:
            return row.network_mse / base.network_mse
    return None


def _is_best(record: CompareRecord, row: CompareRow) -> bool:
    rivals = [
        other.network_mse
        for other in record.rows
        if not row.peer
        and _group(other) == _group(row)
        and (other.variant == "ptq") == (row.variant == "ptq")
        and other.network_mse is not None
    ]
    return len(rivals) > 1 and row.network_mse == min(rivals)


def _make_texts(record: CompareRecord, row: CompareRow) -> dict[str, str]:
    bits = f"{format_fixed(row.weight_bits)} / {format_fixed(row.activation_bits)}"
    return {
        "strategy": label_of(row),
        "budget": DASH if row.budget is None else format_number(row.budget),
        "bits": bits,
        "branch": format_percent(row.branch_parameter_fraction),
        "network_mse": DASH if row.network_mse is None else f"{row.network_mse:.3e}",
        "against_uniform": format_ratio(ratio_to_uniform(record, row)),
        "frechet_distance": format_spread(row.frechet_distance, 3),
        "frechet_ratio": format_spread(row.frechet_ratio, 2),
        "class_accuracy": format_percent(row.class_accuracy and row.class_accuracy.mean),
        "psnr_db": format_spread(row.psnr_db, 1),
        "num_evaluations": format_count(row.num_evaluations),
        **{name: format_seconds(row.seconds.get(name)) for name in TIMED},
    }
