"""Running a comparison: cell after cell, each a run folder that goes on where it was stopped.

DIR/compare.json compare.html compare.png    the table and its views, grown by every cell
DIR/cells/<strategy>-<budget>[-<mode>]/      a run: search, calibrate, finetune, evaluate
DIR/samples/                                 full precision's images, the same for all cells
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from treeq_export import __version__
from treeq_export.artefacts import write_bytes
from treeq_export.compare.cells import Cell, comparable_part, make_cells, shared_recipe
from treeq_export.compare.figures import draw_png
from treeq_export.compare.html import render_comparison
from treeq_export.compare.options import CompareOptions, command_line
from treeq_export.compare.peer_cells import PeerCell
from treeq_export.compare.progress import CompareProgress, Progress
from treeq_export.compare.rows import read_quality, spread_of
from treeq_export.environment import describe_environment
from treeq_export.errors import OutputError, PlanError
from treeq_export.pipeline.run import check_recipe, recipe_with_digests
from treeq_export.pipeline.workspace import Workspace
from treeq_export.progress import Say, say_nothing
from treeq_export.recipe import Recipe
from treeq_export.records import CompareRecord, CompareRow, QualityRecord, load_record, save_record
from treeq_export.run_folder import RunFolder

COMPARE_FILE = "compare.json"
HTML_FILE = "compare.html"
PNG_FILE = "compare.png"
CELLS_FOLDER = "cells"


def run_compare(
    workspace: Workspace,
    options: CompareOptions,
    on_progress: CompareProgress,
) -> CompareRecord:
    """Run every cell that is not up to date, and write the table and its views after each.

    Args:
        workspace: The comparison's folder, with its recipe (`open_comparison`).
        options: The cells.
        on_progress: Shows how far it is.

    Returns:
        The table; rows of earlier calls with other budgets or strategies are in it.

    Raises:
        OutputError: The folder belongs to something else, or cannot be written to.
        TreeqError: A stage failed; finished cells are kept.
    """
    cells: list[Cell | PeerCell] = [*make_cells(workspace.recipe, options)]
    cells += [PeerCell(peer, workspace.recipe) for peer in options.peers]
    table = _Table(workspace, [cell.name for cell in cells])
    num_to_do = sum(not _is_finished(workspace, cell) for cell in cells)
    done = Progress(0, len(cells), num_to_do=num_to_do)
    for cell in cells:
        with _open_run(workspace, cell) as run:
            worked = cell.work(run, partial(on_progress.start_stage, cell.name))
            row = cell.make_row(run)
            table.add(row, read_quality(run))
        if worked:
            write_views(workspace, options, table.record)
        done.tick(worked)
        on_progress.finish_cell(row, done)
    write_views(workspace, options, table.record)
    return table.record


def _open_run(workspace: Workspace, cell: Cell | PeerCell) -> Workspace:
    return workspace.sibling(workspace.run / CELLS_FOLDER / cell.name, cell.recipe)


def _is_finished(workspace: Workspace, cell: Cell | PeerCell) -> bool:
    """Whether nothing is left to do of a cell."""
    if not (workspace.run / CELLS_FOLDER / cell.name / RunFolder.RUN).is_file():
        return False
    with _open_run(workspace, cell) as run:
        return cell.is_finished(run)


def write_views(workspace: Workspace, options: CompareOptions, record: CompareRecord) -> None:
    """Write compare.html and compare.png.

    Raises:
        OutputError: The folder cannot be written to.
    """
    out = workspace.run
    command = command_line(options, workspace.recipe_path or "RECIPE", workspace.overrides, out)
    write_bytes(out / HTML_FILE, render_comparison(record, out, command).encode())
    write_bytes(out / PNG_FILE, draw_png(record))


def open_comparison(
    out: Path, recipe: Recipe, recipe_path: str, overrides: tuple[str, ...], options: CompareOptions
) -> Workspace:
    """Return the workspace of a comparison's folder; it holds the folder's lock.

    Args:
        out: The folder.
        recipe: The recipe as the user wrote it.
        recipe_path: File that the recipe was read from.
        overrides: The `--set` assignments.
        options: The cells; their seeds replace those of the recipe.

    Raises:
        RecipeError: Too few seeds, or a file of the recipe is missing.
        OutputError: The folder is that of a run, cannot be written to, or is in use.
    """
    shared = shared_recipe(recipe, options)
    check_recipe(shared)
    if (out / RunFolder.RUN).is_file():
        raise OutputError(f"{out}: is the folder of a run. Choose another --out.")
    return Workspace(out, shared, recipe_path, overrides)


class _Table:
    """The rows so far, in the order of the cells; then those of earlier calls."""

    def __init__(self, workspace: Workspace, names: list[str]) -> None:
        self.path = workspace.run / COMPARE_FILE
        self.names = names
        self.record = CompareRecord(
            version=__version__,
            name=workspace.recipe.name,
            checkpoint_sha256=workspace.checkpoint.sha256,
            recipe=comparable_part(recipe_with_digests(workspace)),
            num_samples=workspace.recipe.evaluate.num_samples,
            seeds=list(workspace.recipe.evaluate.seeds),
            conditioning=workspace.denoiser.conditioning_source,
            fp_frechet_distance=None,
            fp_class_accuracy=None,
            rows=[],
            pending=names,
            environment=describe_environment(torch.get_num_threads()),
        )
        old = read_comparison(workspace.run, workspace.say)
        if old is not None:
            _check_same(workspace.run, old, self.record)
            rows = old.rows if old.version == __version__ else []
            self._update(
                rows,
                fp_frechet_distance=old.fp_frechet_distance,
                fp_class_accuracy=old.fp_class_accuracy,
            )
        save_record(self.path, self.record)

    def add(self, row: CompareRow, quality: QualityRecord) -> None:
        """Put a row in its place and write the table."""
        fp = [seed.fp for seed in quality.seeds]
        self._update(
            [*self.record.rows, row],
            fp_frechet_distance=spread_of(fp, "frechet_distance"),
            fp_class_accuracy=spread_of(fp, "class_accuracy"),
        )
        save_record(self.path, self.record)

    def _update(self, rows: Iterable[CompareRow], **changes: Any) -> None:
        by_name = {row.name: row for row in rows}
        order = dict.fromkeys([*self.names, *by_name])
        changes |= {
            "rows": [by_name[name] for name in order if name in by_name],
            "pending": [name for name in self.names if name not in by_name],
        }
        self.record = self.record.model_copy(update=changes)


def read_comparison(out: Path, say: Say = say_nothing) -> CompareRecord | None:
    """Return the table of a folder; None where there is none yet, or it is damaged.

    Raises:
        OutputError: compare.json is malformed.
    """
    path = out / COMPARE_FILE
    if not path.is_file():
        return None
    try:
        record = load_record(path, CompareRecord, "compare")
    except PlanError as error:
        raise OutputError(
            f"{path}: not what this treeq-export writes. Remove it and run the same command again."
        ) from error
    if record.is_sealed():
        return record
    say(f"{path}: damaged, or of an older treeq-export; its rows are made again.")
    return None


def _check_same(out: Path, old: CompareRecord, new: CompareRecord) -> None:
    """Check that rows of both tables can stand beside each other.

    Raises:
        OutputError: Names the first setting that differs.
    """
    for section in sorted({*old.recipe, *new.recipe}):
        before, now = old.recipe.get(section), new.recipe.get(section)
        if before == now:
            continue
        name, was, is_now = section, before, now
        if isinstance(before, dict) and isinstance(now, dict):
            key = next(k for k in {**before, **now} if before.get(k) != now.get(k))
            name, was, is_now = f"{section}.{key}", before.get(key), now.get(key)
        raise OutputError(
            f"{out}: holds the comparison of another recipe: {name} was {was!r:.60}, "
            f"is {is_now!r:.60}. Choose another --out, or remove this folder."
        )
