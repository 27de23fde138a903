"""Progress of a comparison on a console: a bar for the stage at work and a line per cell."""

import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich import progress
from rich.console import Console

from treeq_export.progress import OnStep
from treeq_export.records import CompareRow
from treeq_export.report.quantities import format_fixed, format_ratio, format_seconds


@dataclass
class Progress:
    """How far a comparison is.

    Attributes:
        num_done: Finished cells.
        num_cells: All cells.
        worked: Whether the last one had anything to do.
        left_s: Estimated seconds for the rest, from the cells of this process; None before one.
        num_to_do: Cells that were not finished at the start.
        num_worked: Cells that this process has worked on.
        started_s: Start by the monotonic clock.
    """

    num_done: int
    num_cells: int
    worked: bool = False
    left_s: float | None = None
    num_to_do: int = 0
    num_worked: int = 0
    started_s: float = field(default_factory=time.monotonic)

    def tick(self, worked: bool) -> None:
        """Count a cell."""
        self.num_done += 1
        self.worked = worked
        self.num_worked += worked
        if self.num_worked:
            per_cell = (time.monotonic() - self.started_s) / self.num_worked
            self.left_s = per_cell * max(self.num_to_do - self.num_worked, 0)


class CompareProgress:
    """Shows the stage at work as a bar, and every finished cell as a line.

    Args:
        console: Console to print to; one that is no terminal gets the lines only.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def start_stage(self, cell: str, stage: str) -> OnStep:
        """Open the bar of a stage in the place of the one before."""
        for task in self.bars.task_ids:
            self.bars.remove_task(task)
        task = self.bars.add_task(f"{cell}: {stage}", total=1.0)
        return lambda fraction: self.bars.update(task, completed=fraction)

    def finish_cell(self, row: CompareRow, done: Progress) -> None:
        """Print a line for a finished cell."""
        left = f", about {format_seconds(done.left_s)} left" if done.left_s else ""
        state = describe_row(row) if done.worked else "up to date"
        self.console.print(
            f"[{done.num_done}/{done.num_cells}] {row.name}: {state}{left}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def describe_row(row: CompareRow) -> str:
    """Return a row's bits and scores in one line."""
    parts = [f"W{format_fixed(row.weight_bits)} A{format_fixed(row.activation_bits)}"]
    if row.network_mse is not None:
        parts.append(f"network MSE {row.network_mse:.3e}")
    if row.frechet_ratio is not None:
        parts.append(f"Frechet {format_ratio(row.frechet_ratio.mean)} of full precision")
    return ", ".join(parts)
