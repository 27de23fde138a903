"""`compare.html`: the table and the picture of a comparison in one self-contained file."""

from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from treeq_export.compare.figures import draw_svg
from treeq_export.compare.view import EMULATED, TIMED, label_of, table_rows
from treeq_export.records import CompareRecord, CompareRow
from treeq_export.report.html import Grid, make_environment, read_grid
from treeq_export.report.quantities import flatten
from treeq_export.run_folder import RunFolder

TEMPLATE = "compare.html.j2"


def render_comparison(record: CompareRecord, out: Path, command: str) -> str:
    """Return the page.

    Args:
        record: The table.
        out: Folder of the comparison, for the samples of the cells.
        command: The command line that repeats the comparison.
    """
    view: dict[str, Any] = {
        "record": record,
        "rows": table_rows(record),
        "timed": TIMED,
        "emulated": EMULATED,
        "plot": Markup(draw_svg(record)) if record.rows else "",
        "grids": _read_grids(record, out),
        "environment": flatten(record.environment),
        "recipe_yaml": yaml.safe_dump(record.recipe, sort_keys=False, allow_unicode=True),
        "command": command,
    }
    return make_environment("treeq_export.compare").get_template(TEMPLATE).render(view) + "\n"


def _read_grids(record: CompareRecord, out: Path) -> list[Grid]:
    """Return the samples of full precision, then of every cell; all start from equal noise."""
    if not record.rows:
        return []
    first = out / "cells" / record.rows[0].name
    grids = [read_grid(first, "Full precision", RunFolder.sample_grid("fp"))]
    for row in record.rows:
        folder = out / "cells" / row.name
        grids.append(read_grid(folder, _title(row), RunFolder.sample_grid("quantized")))
    return grids


def _title(row: CompareRow) -> str:
    budget = row.description if row.peer else f"budget {row.budget:g}"
    return f"{label_of(row)}, {budget}"
