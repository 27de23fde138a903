"""Where a search's evaluations are measured: in this process, or by workers (ray_executor.py).

A task is a node of the search tree, one configuration of its left child, and the configurations of
its right child to try with it: the worker computes the left child's output once and measures each
of the others on top of it. Executors know no more about a search than that. `measure_all` sends
them only what the journal does not know yet.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Protocol, Self

from treeq_export.progress import OnStep
from treeq_export.search.journal import Journal

Key = tuple[str, str, str]  # node, prefix, suffix


@dataclass(frozen=True)
class Task:
    """Evaluations that share the left child's output.

    Attributes:
        node: The node of the tree, or a name for what else is measured, such as "network".
        prefix: The configuration of the left child, "" where there is none.
        suffixes: The configurations of the right child to measure with that prefix.
    """

    node: str
    prefix: str
    suffixes: tuple[str, ...]


class Worker(Protocol):
    """What measures. It must give the same value for the same key in every process."""

    def measure(self, task: Task) -> Iterator[float]:
        """Yield one value per suffix, in order, each measured when it is asked for."""
        ...


class Executor(Protocol):
    """Hands tasks to workers. A context manager that touches nothing before it is entered."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, str, float]]:
        """Yield task, suffix and value as they are measured, in any order."""
        ...


class LocalExecutor:
    """Measures in this process, one task after the other.

    Args:
        make_worker: Returns the worker; called once, when the first value is asked for, so that
            a search whose values are all known builds none.
    """

    def __init__(self, make_worker: Callable[[], Worker]) -> None:
        self._make_worker = make_worker
        self._worker: Worker | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker = None

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, str, float]]:
        """Yield task, suffix and value as they are measured, in the order of the tasks."""
        for task in tasks:
            if self._worker is None:
                self._worker = self._make_worker()
            for suffix, value in zip(task.suffixes, self._worker.measure(task), strict=True):
                yield task, suffix, value


class Tally:
    """Counts what was measured and what the journal knew, and says how far the search is.

    Pass it, or what `count` returns, as `on_measured`.

    Args:
        expected: Block runs that the search will take. What a strategy measures beyond them moves
            the bar towards its end without reaching it.
        on_step: Called with the fraction done, 0..1.
        before: The fraction at which measuring starts.
    """

    def __init__(
        self, expected: int = 1, on_step: OnStep = lambda _: None, before: float = 0
    ) -> None:
        self.num_measured = self.num_reused = 0
        self.seconds = 0.0  # spent measuring
        self._expected = max(expected, 1)
        self._on_step = on_step
        self._before = before
        self._done = self._fraction = 0.0

    def __call__(self, seconds: float | None, block_runs: float = 0.0) -> None:
        """Count one value, measured in `seconds`, or reused (None)."""
        self.num_measured += seconds is not None
        self.num_reused += seconds is None
        self.seconds += seconds or 0.0
        self._done += block_runs
        left = max(self._expected - self._done, 0.05 * self._done)
        self._fraction = max(self._fraction, self._done / (self._done + left))
        self._on_step(self._before + (1 - self._before) * self._fraction)

    def count(self, tasks: Sequence[Task], block_runs: int) -> Callable[[float | None], None]:
        """Return what `measure_all` calls for every value of tasks of so many block runs."""
        number = max(sum(len(task.suffixes) for task in tasks), 1)
        return partial(self, block_runs=block_runs / number)


def measure_all(
    tasks: Sequence[Task],
    journal: Journal,
    executor: Executor,
    on_measured: Callable[[float | None], None],
) -> dict[Key, float]:
    """Return the values of all tasks; measure and record those that the journal does not know.

    A key that several tasks hold is measured once. Each value is in the journal before
    `on_measured` hears of it.

    Args:
        tasks: Tasks to measure.
        journal: An entered journal.
        executor: An entered executor.
        on_measured: Called once per key, with the seconds since the value before it (so they sum up
            to the time spent, with any number of workers), or with None for a reused value.

    Returns:
        The value by (node, prefix, suffix), in the order of the tasks.
    """
    values: dict[Key, float] = {}
    wanted: dict[Key, None] = {}
    missing: list[Task] = []
    for task in tasks:
        known = journal.lookup(task.node, task.prefix)
        keys = [(task.node, task.prefix, suffix) for suffix in dict.fromkeys(task.suffixes)]
        fresh = [key for key in keys if key not in wanted]
        wanted.update(dict.fromkeys(fresh))
        for key in fresh:
            if key[2] in known:
                values[key] = known[key[2]]
                on_measured(None)
        if rest := tuple(key[2] for key in fresh if key not in values):
            missing.append(Task(task.node, task.prefix, rest))
    before = perf_counter()
    for task, suffix, value in executor.run(missing):
        seconds = perf_counter() - before
        before += seconds
        journal.record(task.node, task.prefix, suffix, value, seconds)
        values[task.node, task.prefix, suffix] = value
        on_measured(seconds)
    return {key: values[key] for key in wanted}
