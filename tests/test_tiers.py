"""A test that takes too long without a marker fails, and so do all that use such a fixture."""

from collections.abc import Callable

import pytest

Run = Callable[[str], tuple[dict[str, int], str]]
PLUGIN = """\
import time
import pytest
from tests import meter

def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
"""
CHILD = "import time\\nwhile time.process_time() < 0.3: pass"


@pytest.fixture
def outcomes(pytester: pytest.Pytester) -> Run:
    """A function: source of tests -> numbers of outcomes, and what is printed. The limit is 0.2."""

    def run(source: str) -> tuple[dict[str, int], str]:
        pytester.makeini("[pytest]\nmarkers =\n    slow\n    triton\n")
        pytester.makepyfile(PLUGIN + source)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TREEQ_TEST_CPU_S", "0.2")
            done = pytester.runpytest_inprocess("-p", "tests.tiers", "-p", "no:cacheprovider")
        return done.parseoutcomes(), done.stdout.str()

    return run


def test_only_what_is_long_and_unmarked_fails(outcomes: Run):
    counted, printed = outcomes("""
def test_quick():
    burn(0.05)

def test_long():
    burn(0.4)

@pytest.mark.slow
def test_long_but_marked():
    burn(0.4)

def test_uncharged():
    with meter.uncharged():
        burn(0.4)
""")
    assert counted == {"passed": 3, "failed": 1}
    assert "::test_long: took 0.4 CPU-seconds; the limit is 0.2. Make it cheaper" in printed


def test_setup_and_children_count(outcomes: Run):
    counted, printed = outcomes(f"""
import subprocess, sys

@pytest.fixture
def long():
    burn(0.15)

def test_both(long):
    burn(0.15)

def test_child():
    subprocess.run([sys.executable, "-c", {CHILD!r}], check=True)

def test_process_that_has_not_ended():
    meter.charge(0.3)
""")
    assert counted == {"failed": 3}
    assert "::test_both: took 0.3" in printed


def test_a_long_shared_fixture_fails_all_that_use_it_unmarked(outcomes: Run):
    counted, printed = outcomes("""
@pytest.fixture(scope="session")
def inner():
    burn(0.4)

@pytest.fixture(scope="module")
def outer(inner):
    return 1

@pytest.mark.slow
def test_first(outer):
    pass

def test_second(outer):
    pass

def test_third(inner):
    pass

def test_other():
    pass
""")
    assert counted == {"passed": 2, "errors": 2}
    assert "its fixture inner took 0.4 CPU-seconds" in printed
    assert "fixture outer" not in printed


def test_a_failure_stays_what_it_is(outcomes: Run):
    counted, printed = outcomes("""
def test_wrong():
    burn(0.4)
    assert 1 == 2
""")
    assert counted == {"failed": 1}
    assert "assert 1 == 2" in printed
    assert "CPU-seconds" not in printed
