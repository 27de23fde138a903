"""Damaged files: each reader ends in a value or in one line, soon and in little memory."""

import os
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.fuzz.inputs import INPUTS, Input, read_whole_graph
from tests.fuzz.mutate import mutate
from tests.tiny_models import TinyRun
from treeq_export.errors import TreeqError
from treeq_export.run_folder import RunFolder

SHORT = 12  # damaged files of each input in the quick tier
LONGEST_S, MOST_BYTES = 30.0, 1 << 30


@contextmanager
def _limited_memory() -> Iterator[None]:
    """Let the process grow by 1 GB of address space and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _describe(case: Input, path: Path) -> str:
    """Read a file; return "" for a value or one line, else what is wrong."""
    started = time.monotonic()
    problem = ""
    try:
        case.read(path)
    except (TreeqError, ValueError) as error:
        line = str(error)
        if type(error) is not ValueError and not isinstance(error, TreeqError):
            problem = f"{type(error).__name__}: {line:.200}"
        elif "\n" in line.strip() or not line:
            problem = f"not one line: {line[:200]!r}"
        elif type(error) is ValueError and "manifest.json" not in line:
            problem = f"ValueError: {line:.200}"
    except Exception as error:
        problem = f"{type(error).__name__}: {error!s:.200}"
    if time.monotonic() - started > LONGEST_S:
        problem += " (took longer than 30 s)"
    return problem


def _fuzz(case: Input, folder: Path, count: int, seed: int) -> list[str]:
    """Return what is wrong with `count` damaged files, by number; the right file is read first."""
    path = case.make(folder)
    right = path.read_bytes()
    problems = []
    case.read(path)
    rng = random.Random(f"{case.name} {seed}")
    names = set(folder.iterdir())
    with _limited_memory():
        for number in range(count):
            data = mutate(right, rng)
            path.write_bytes(data)
            if case.exact and data != right:
                with pytest.raises(TreeqError):
                    case.read(path)
            problem = _describe(case, path)
            if problem:
                problems.append(f"{case.name} {number}: {problem}")
                keep = os.environ.get("TREEQ_FUZZ_KEEP")
                if keep:
                    shutil.copy(path, Path(keep) / f"{case.name.replace(' ', '_')}.{number}")
    assert names <= set(folder.iterdir())  # nothing is removed
    return problems


@pytest.mark.parametrize("case", INPUTS, ids=lambda case: case.name)
def test_damaged_files_are_one_line(case: Input, tmp_path: Path) -> None:
    problems = _fuzz(case, tmp_path, SHORT, seed=1)
    assert problems == []


@pytest.mark.slow
@pytest.mark.parametrize("case", INPUTS, ids=lambda case: case.name)
def test_many_damaged_files_are_one_line(
    case: Input, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    problems = _fuzz(case, tmp_path, case.long, seed=2)
    record_property("damaged_files", case.long)
    assert problems == []


def test_the_long_tier_reads_ten_thousand() -> None:
    assert sum(case.long for case in INPUTS) >= 10_000
    assert len({case.name for case in INPUTS}) == len(INPUTS)


def test_damage_is_the_same_for_a_seed_and_differs_else() -> None:
    data = b'{"a": [1, 2, {"b": "text"}], "c": 0.5}'
    first = [mutate(data, rng) for rng in [random.Random(3)] for _ in range(50)]
    again = [mutate(data, rng) for rng in [random.Random(3)] for _ in range(50)]
    assert first == again
    assert len(set(first)) > 40


@pytest.mark.slow
@pytest.mark.parametrize("target", ["portable", "ort", "fp32"])
def test_damaged_compiled_graphs_are_one_line(
    target: str, compiled_dit: TinyRun, tmp_path: Path
) -> None:
    def make(folder: Path) -> Path:
        return Path(shutil.copy(compiled_dit.run / RunFolder.graph(target), folder))

    case = Input(f"compiled {target}", 150, make, read_whole_graph)
    assert _fuzz(case, tmp_path, case.long, seed=2) == []
