"""The table of a comparison in a terminal."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from treeq_export.compare.view import EMULATED, table_rows
from treeq_export.records import CompareRecord
from treeq_export.report.quantities import format_spread

COLUMNS = {
    "budget": "budget",
    "bits\nW / A": "bits",
    "branch": "branch",
    "network\nMSE": "network_mse",
    "vs\nuniform": "against_uniform",
    "Frechet\ndistance": "frechet_distance",
    "x FP": "frechet_ratio",
    "PSNR, dB": "psnr_db",
    "search": "search",
    "finetune": "finetune",
    "evals": "num_evaluations",
}


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
        bold = ("network_mse",) if row.best else ()
        names = ("strategy", *COLUMNS.values())
        table.add_row(*(Text(row.texts[name], "bold" if name in bold else "") for name in names))
    console.print(table)
    if record.pending:
        text = f"Still to come: {', '.join(record.pending)}"
        console.print(Text(text, style="yellow"), soft_wrap=True)
