"""The two tiers of the tests.

`make test` leaves out what is marked with one of LONG. A test without such a marker fails if it and
its children take more CPU-seconds than TREEQ_TEST_CPU_S says; `make test` sets 5. What a fixture
takes that tests share is not charged to the test that happens to be first, but has the same limit:
all tests that use a longer one have to be marked. Exports are not charged, see export_cache.
"""

import os
from collections.abc import Generator
from typing import Any

import pytest

from tests import export_cache, meter
from treeq_export.environment import available_cpus

# Files that take minutes are begun first, so that no worker is left alone with one at the end.
LONGEST_FILES = (
    "tests/gpu_kernels/test_compiled.py",
    "tests/test_readme.py",
    "tests/test_kills.py",
)
LONG = ("slow", "triton")
SPENT = pytest.StashKey[float]()

_fixture_s: dict[tuple[str, str], float] = {}  # by name and place, without those it uses
_nested_s = [0.0]  # of shared fixtures: a stack, one entry for each that is being set up


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the number of cores that this process may use."""
    return available_cpus()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Tidy the exports, in the process that starts the workers."""
    if not hasattr(session.config, "workerinput"):
        export_cache.remove_unused()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first; the others stay as they are."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST_FILES))


def is_long(item: pytest.Item) -> bool:
    """Whether `make test` leaves this test out."""
    return any(item.get_closest_marker(name) for name in LONG)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, Any, Any]:
    """Measure a fixture that tests share."""
    if fixturedef.scope == "function":
        return (yield)
    start = meter.cpu_seconds()
    _nested_s.append(0.0)
    try:
        return (yield)
    finally:
        spent = meter.cpu_seconds() - start
        key = (fixturedef.argname, fixturedef.baseid)
        _fixture_s[key] = max(_fixture_s.get(key, 0.0), spent - _nested_s.pop())
        _nested_s[-1] += spent


def _measure(item: pytest.Item) -> Generator[None, Any, Any]:
    start = meter.cpu_seconds() - _nested_s[0]
    try:
        return (yield)
    finally:
        spent = meter.cpu_seconds() - _nested_s[0] - start
        item.stash[SPENT] = item.stash.get(SPENT, 0.0) + spent


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    """Measure the fixtures of one test."""
    return (yield from _measure(item))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Measure one test."""
    return (yield from _measure(item))


def find_fault(item: pytest.Item, when: str) -> str | None:
    """Return what is wrong with the time of a test that passed, or None."""
    limit = float(os.environ.get("TREEQ_TEST_CPU_S", "inf"))
    remedy = f"the limit is {limit:g}. Make it cheaper, or mark the test as slow."
    if when == "call" and item.stash[SPENT] > limit:
        return f"took {item.stash[SPENT]:.1f} CPU-seconds; {remedy}"
    if when == "setup":
        names = getattr(item, "fixturenames", ())
        for (name, place), spent in _fixture_s.items():
            if name in names and item.nodeid.startswith(place) and spent > limit:
                return f"its fixture {name} took {spent:.1f} CPU-seconds; {remedy}"
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test that took too long."""
    report = yield
    if report.passed and not is_long(item):
        fault = find_fault(item, call.when)
        if fault is not None:
            report.outcome, report.longrepr = "failed", f"{item.nodeid}: {fault}"
    return report
