"""How far a search is, from what it has measured."""

from collections.abc import Callable, Sequence

from treeq_export.search.executor import Tally, Task


class SearchProgress:
    """Turns measured values into the fraction of the search that is done.

    What a strategy measures beyond what is expected moves the bar towards its end without reaching
    it.

    Args:
        expected: Block runs that it will take.
        tally: Counts what is measured and what the journal knew.
        on_step: Called with the fraction done, 0..1.
        before: The fraction at which measuring starts.
    """

    def __init__(
        self, expected: int, tally: Tally, on_step: Callable[[float], None], before: float
    ) -> None:
        self._expected = max(expected, 1)
        self._tally = tally
        self._on_step = on_step
        self._before = before
        self._done = self._fraction = 0.0

    def count(self, tasks: Sequence[Task], block_runs: int) -> Callable[[float | None], None]:
        """Return what `measure_all` calls for every value of these tasks."""
        number = max(sum(len(task.suffixes) for task in tasks), 1)

        def on_measured(seconds: float | None) -> None:
            self._tally(seconds)
            self._done += block_runs / number
            left = max(self._expected - self._done, 0.05 * self._done)
            self._fraction = max(self._fraction, self._done / (self._done + left))
            self._on_step(self._before + (1 - self._before) * self._fraction)

        return on_measured
