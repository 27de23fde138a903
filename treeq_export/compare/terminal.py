"""The table of a comparison in a terminal."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from treeq_export.compare.view import EMULATED, TableRow, table_rows
from treeq_export.records import CompareRecord
from treeq_export.report.quantities import format_spread

COLUMNS = (
    "budget",
    "bits\nW / A",
    "branch",
    "network\nMSE",
    "vs\nuniform",
    "Frechet\ndistance",
    "x FP",
    "PSNR, dB",
    "search",
    "finetune",
    "evals",
)


def print_comparison(record: CompareRecord, console: Console) -> None:
    """Print the table, full precision first.

    Args:
        record: The table.
        console: Console to print to.
    """
    seeds = f"{len(record.seeds)} seed{'' if len(record.seeds) == 1 else 's'}"
    title = f"{record.name}: {record.num_samples} images for each of {seeds}; {EMULATED}"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.pad_edge, table.collapse_padding = False, True
    table.add_column("strategy", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    fp = format_spread(record.fp_frechet_distance, 3)
    table.add_row("full precision", *[""] * 5, fp)
    for row in table_rows(record):
        if row.first:
            table.add_section()
        table.add_row(*_cells(row))
    console.print(table)
    if record.pending:
        text = f"Still to come: {', '.join(record.pending)}"
        console.print(Text(text, style="yellow"), soft_wrap=True)


def _cells(row: TableRow) -> list[Text]:
    """Return the cells of a row; the least network MSE of a budget is bold."""
    texts = (
        row.label,
        row.budget,
        f"{row.weight_bits} / {row.activation_bits}",
        row.branch,
        row.network_mse,
        row.against_uniform,
        row.frechet_distance,
        row.frechet_ratio,
        row.psnr_db,
        row.seconds["search"],
        row.seconds["finetune"],
        row.num_evaluations,
    )
    at_mse = 1 + COLUMNS.index("network\nMSE")
    return [
        Text(text, "bold" if row.best and at == at_mse else "") for at, text in enumerate(texts)
    ]
