"""What some tests need beside Python's packages, and whether it may be missing.

TREEQ_REQUIRE names, separated by commas, what has to be there: triton, chromium, foreign, neon,
x86-emulator, nvcc, gpu, ...; a test that misses something else is skipped.
"""

import os
from typing import NoReturn

import pytest


def is_required(what: str) -> bool:
    """Whether TREEQ_REQUIRE names `what`."""
    return what in os.environ.get("TREEQ_REQUIRE", "").split(",")


def skip_or_fail(what: str, reason: str) -> NoReturn:
    """Skip, or fail where TREEQ_REQUIRE names `what`."""
    if is_required(what):
        pytest.fail(f"TREEQ_REQUIRE names {what}: {reason}")
    pytest.skip(reason)
