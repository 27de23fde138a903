"""The CPU-seconds that a test is charged with."""

import contextlib
import resource
import time
from collections.abc import Iterator

_balance_s = 0.0


def cpu_seconds() -> float:
    """Return the CPU-seconds of this process and of its ended children, less the uncharged ones."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime + _balance_s


def charge(seconds: float) -> None:
    """Add what a process spent that has not ended."""
    global _balance_s
    _balance_s += seconds


@contextlib.contextmanager
def uncharged() -> Iterator[None]:
    """Leave out what is spent inside: it depends on what other tests left."""
    start = cpu_seconds()
    try:
        yield
    finally:
        charge(start - cpu_seconds())
