"""What holds for all tests. Their shared fixtures are in the plugins named here."""

import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

# One thread each, here and in every process that a test starts: the workers share the cores.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

pytest_plugins = [
    "pytester",  # test_tiers
    "tests.export_cache",
    "tests.tiers",
    "tests.tiny_models",
    "tests.digits_runs",
    "tests.hand_layers",
    "tests.commands",
]


def process_state() -> dict[str, object]:
    """What belongs to the process, which the next test shares."""
    handlers = {str(n): signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    return {"working folder": Path.cwd(), **handlers}


@pytest.fixture(autouse=True)
def _leaves_the_process_as_it_was() -> Generator[None]:
    before = process_state()
    yield
    assert process_state() == before
