"""Running a comparison: cell after cell, each a run folder that goes on where it was stopped.

DIR/compare.json compare.html compare.png    the table and its views, grown by every cell
DIR/cells/<strategy>-<budget>[-<mode>]/      a run: search, calibrate, finetune, evaluate
DIR/samples/                                 full precision's images, the same for all cells
"""

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from treeq_export import __version__
from treeq_export.artefacts import atomic_path, write_bytes
from treeq_export.compare.cells import Cell, comparable_part, make_cells, shared_recipe
from treeq_export.compare.figures import draw_png
from treeq_export.compare.html import render_comparison
from treeq_export.compare.options import CompareOptions, command_line
from treeq_export.compare.peer_cells import is_peer_finished, make_peer_row, peer_folder, run_peer
from treeq_export.compare.rows import make_row, read_quality, spread_accuracy, spread_distance
from treeq_export.environment import describe_environment
from treeq_export.errors import OutputError, PlanError
from treeq_export.pipeline.run import (
    check_recipe,
    fingerprint,
    is_up_to_date,
    recipe_with_digests,
    run_stage,
    stage_named,
)
from treeq_export.pipeline.workspace import RUN_FILE, Workspace, read_run
from treeq_export.recipe import Recipe
from treeq_export.records import CompareRecord, CompareRow, QualityRecord, load_record, save_record
from treeq_export.sealed import Say, say_nothing

COMPARE_FILE = "compare.json"
HTML_FILE = "compare.html"
PNG_FILE = "compare.png"
CELLS_FOLDER = "cells"
SHARED_STAGES = ("search", "calibrate")
CELL_STAGES = (*SHARED_STAGES, "finetune", "evaluate")

OnStep = Callable[[float], None]


class OnProgress(Protocol):
    """Shows how far a comparison is."""

    def start_stage(self, cell: str, stage: str) -> OnStep:
        """Open the bar of a stage; return the callback for the fraction done."""
        ...

    def finish_cell(self, row: CompareRow, done: "Progress") -> None:
        """Show a finished cell."""
        ...


@dataclass(frozen=True)
class Progress:
    """How far a comparison is.

    Attributes:
        num_done: Finished cells.
        num_cells: All cells.
        worked: Whether the last one had anything to do.
        left_s: Estimated seconds for the rest, from the cells of this process; None before one.
    """

    num_done: int
    num_cells: int
    worked: bool
    left_s: float | None


def run_compare(
    workspace: Workspace,
    options: CompareOptions,
    on_progress: OnProgress,
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
    cells: list[_Ours | _Theirs] = [
        _Ours(workspace, cell) for cell in make_cells(workspace.recipe, options)
    ]
    cells += [_Theirs(workspace, name) for name in options.peers]
    table = _Table(workspace, [cell.name for cell in cells])
    clock = _Clock(sum(not cell.is_finished() for cell in cells), len(cells))
    for cell in cells:
        with cell.open() as run:
            worked = cell.work(run, on_progress)
            row = cell.make_row(run)
            table.add(row, read_quality(run))
        if worked:
            write_views(workspace, options, table.record)
        on_progress.finish_cell(row, clock.tick(worked))
    write_views(workspace, options, table.record)
    return table.record


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
        recipe_path: Where it came from.
        overrides: The `--set` assignments.
        options: Their seeds count.

    Raises:
        RecipeError: Too few seeds, or a file of the recipe is missing.
        OutputError: The folder is that of a run, cannot be written to, or is in use.
    """
    shared = shared_recipe(recipe, options)
    check_recipe(shared)
    if (out / RUN_FILE).is_file():
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
            fp_frechet_distance=spread_distance(fp),
            fp_class_accuracy=spread_accuracy(fp),
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


class _Clock:
    """Estimates the time left from the cells that this process has worked on."""

    def __init__(self, num_to_do: int, num_cells: int) -> None:
        self.num_to_do, self.num_cells = num_to_do, num_cells
        self.num_done = self.num_worked = 0
        self.started = time.monotonic()

    def tick(self, worked: bool) -> Progress:
        """Count a cell."""
        self.num_done += 1
        self.num_worked += worked
        left = None
        if self.num_worked:
            per_cell = (time.monotonic() - self.started) / self.num_worked
            left = per_cell * max(self.num_to_do - self.num_worked, 0)
        return Progress(self.num_done, self.num_cells, worked, left)


class _Ours:
    """A cell whose plan comes from one of our strategies.

    Args:
        workspace: The comparison.
        cell: The cell.
    """

    def __init__(self, workspace: Workspace, cell: Cell) -> None:
        self.workspace, self.cell, self.name = workspace, cell, cell.name
        self.folder = workspace.run / CELLS_FOLDER

    def open(self) -> Workspace:
        """Return the cell's run."""
        return self.workspace.sibling(self.folder / self.name, self.cell.recipe)

    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        if not (self.folder / self.name / RUN_FILE).is_file():
            return False
        with self.open() as run:
            return all(is_up_to_date(run, stage_named(name)) for name in CELL_STAGES)

    def work(self, run: Workspace, on_progress: OnProgress) -> bool:
        """Run the stages that are not up to date; return whether there were any."""
        run.save()
        if self.cell.base is not None:
            _take_over(self.folder / self.cell.base, run)
        worked = False
        for name in CELL_STAGES:
            if not is_up_to_date(run, stage_named(name)):
                worked = True
                run_stage(run, stage_named(name), on_progress.start_stage(self.name, name))
        return worked

    def make_row(self, run: Workspace) -> CompareRow:
        """Return the row of the finished cell."""
        return make_row(self.cell, run)


class _Theirs:
    """A cell of another toolkit.

    Args:
        workspace: The comparison.
        peer: One of `peers.PEERS`.
    """

    def __init__(self, workspace: Workspace, peer: str) -> None:
        self.workspace, self.peer, self.name = workspace, peer, peer_folder(peer)

    def open(self) -> Workspace:
        """Return the cell's run."""
        folder = self.workspace.run / CELLS_FOLDER / self.name
        return self.workspace.sibling(folder, self.workspace.recipe)

    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        with self.open() as run:
            return is_peer_finished(run, self.peer)

    def work(self, run: Workspace, on_progress: OnProgress) -> bool:
        """Quantize and measure unless that is done; return whether it was not."""
        return run_peer(run, self.peer, lambda stage: on_progress.start_stage(self.name, stage))

    def make_row(self, run: Workspace) -> CompareRow:
        """Return the row of the finished cell."""
        return make_peer_row(run, self.peer)


def _take_over(base: Path, run: Workspace) -> None:
    """Copy what another cell has searched and calibrated with the same recipe sections."""
    done = read_run(base).stages
    for name in SHARED_STAGES:
        stage, record = stage_named(name), done.get(name)
        if record is None or record.fingerprint != fingerprint(run, stage):
            return
        if not is_up_to_date(run, stage):
            for file in record.outputs:
                with atomic_path(run.run / file) as temporary:
                    shutil.copyfile(base / file, temporary)
            run.stages[name] = record
    run.save()
