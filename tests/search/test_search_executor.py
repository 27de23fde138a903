"""Executors give every task's values; `measure_all` measures what the journal does not know."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from treeq_export.errors import PlanError
from treeq_export.search.executor import LocalExecutor, Tally, Task, measure_all
from treeq_export.search.journal import Journal


class Divider:
    """Measures node length + prefix / suffix, and keeps what it was asked."""

    def __init__(self, calls: list[tuple[str, str, str]]) -> None:
        self.calls = calls

    def measure(self, task: Task) -> Iterator[float]:
        for suffix in task.suffixes:
            self.calls.append((task.node, task.prefix, suffix))
            if suffix == "0":
                raise PlanError("root: received 0. Expected a divisor.")
            yield len(task.node) + int(task.prefix or 1) / int(suffix)


@pytest.fixture
def calls() -> list[tuple[str, str, str]]:
    return []


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal.sqlite", "f") as journal:
        yield journal


def expected(*tasks: Task) -> dict[tuple[str, str, str], float]:
    return {
        (task.node, task.prefix, suffix): len(task.node) + int(task.prefix or 1) / int(suffix)
        for task in tasks
        for suffix in task.suffixes
    }


def measure(
    tasks: list[Task], journal: Journal, calls: list[Any]
) -> tuple[dict[tuple[str, str, str], float], Tally]:
    tally = Tally()
    with LocalExecutor(lambda: Divider(calls)) as executor:
        return measure_all(tasks, journal, executor, tally), tally


def test_measures_everything_in_the_order_of_the_tasks(
    journal: Journal, calls: list[tuple[str, str, str]]
) -> None:
    tasks = [Task("root", "3", ("7", "5")), Task("leaf", "", ("2",)), Task("root", "1", ("7",))]
    values, tally = measure(tasks, journal, calls)
    assert values == expected(*tasks)
    assert list(values) == list(expected(*tasks)) == calls
    assert (tally.num_measured, tally.num_reused) == (4, 0)
    assert tally.seconds > 0
    assert journal.lookup("root", "3") == {"7": 4 + 3 / 7, "5": 4 + 3 / 5}


def test_known_values_are_not_measured(journal: Journal, calls: list[tuple[str, str, str]]) -> None:
    measure([Task("root", "3", ("7", "5"))], journal, calls)
    calls.clear()
    tasks = [Task("root", "3", ("5", "7")), Task("leaf", "2", ("9",))]
    values, tally = measure(tasks, journal, calls)
    assert list(values.items()) == list(expected(*tasks).items())
    assert calls == [("leaf", "2", "9")]
    assert (tally.num_measured, tally.num_reused) == (1, 2)


def test_partly_known_task_is_sent_with_the_rest(
    journal: Journal, calls: list[tuple[str, str, str]]
) -> None:
    measure([Task("root", "3", ("7", "5"))], journal, calls)
    calls.clear()
    task = Task("root", "3", ("4", "7", "6", "5"))
    values, tally = measure([task], journal, calls)
    assert list(values.items()) == list(expected(task).items())
    assert calls == [("root", "3", "4"), ("root", "3", "6")]
    assert (tally.num_measured, tally.num_reused) == (2, 2)


def test_key_of_several_tasks_is_measured_once(
    journal: Journal, calls: list[tuple[str, str, str]]
) -> None:
    tasks = [Task("root", "3", ("7", "7")), Task("root", "3", ("7", "5"))]
    values, tally = measure(tasks, journal, calls)
    assert values == expected(*tasks)
    assert calls == [("root", "3", "7"), ("root", "3", "5")]
    assert (tally.num_measured, tally.num_reused) == (2, 0)


def test_search_with_all_values_known_builds_no_worker(
    journal: Journal, calls: list[tuple[str, str, str]]
) -> None:
    task = Task("root", "3", ("7",))
    measure([task], journal, calls)

    def refuse() -> Divider:
        raise AssertionError

    with LocalExecutor(refuse) as executor:
        assert measure_all([task], journal, executor, Tally()) == expected(task)


def test_worker_is_built_once(journal: Journal) -> None:
    built: list[Divider] = []

    def make_worker() -> Divider:
        built.append(Divider([]))
        return built[-1]

    with LocalExecutor(make_worker) as executor:
        for prefix in ("1", "2"):
            measure_all([Task("root", prefix, ("3",))], journal, executor, Tally())
    assert len(built) == 1


def test_value_is_recorded_before_it_is_reported(
    journal: Journal, calls: list[tuple[str, str, str]]
) -> None:
    known: list[int] = []
    with LocalExecutor(lambda: Divider(calls)) as executor:
        measure_all(
            [Task("root", "3", ("7", "5"))],
            journal,
            executor,
            lambda _: known.append(len(journal.lookup("root", "3"))),
        )
    assert known == [1, 2]


def test_error_of_the_worker_reaches_the_caller_and_keeps_what_came_before(
    journal: Journal, calls: list[tuple[str, str, str]]
) -> None:
    with pytest.raises(PlanError, match=r"root: received 0\."):
        measure([Task("root", "3", ("7", "0", "5"))], journal, calls)
    assert journal.lookup("root", "3") == {"7": 4 + 3 / 7}
    assert calls[-1] == ("root", "3", "0")


def test_worker_with_too_few_values_is_a_mistake(journal: Journal) -> None:
    class Silent:
        def measure(self, task: Task) -> Iterator[float]:
            yield from [1.0] * (len(task.suffixes) - 1)

    with LocalExecutor(Silent) as executor, pytest.raises(ValueError, match="shorter"):
        measure_all([Task("root", "3", ("7", "5"))], journal, executor, Tally())
