"""Threads and memory follow affinity and the container's limits, whichever version of cgroups."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from treeq_export import environment
from treeq_export.environment import (
    available_cpus,
    available_memory,
    default_threads,
    settle_threads,
)

CPUS = len(os.sched_getaffinity(0))
RAM = psutil.virtual_memory().total + psutil.swap_memory().total
V1 = "4:memory:/docker/abc\n3:cpuset:/docker/abc\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/x\n"
V2 = "0::/user.slice/abc\n"


@pytest.fixture
def many_cpus(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    return 16


def write(root: Path, files: dict[str, str], membership: str) -> tuple[Path, Path]:
    for name, text in files.items():
        path = root / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    member = root / "membership"
    member.write_text(membership)
    return root / "cgroup", member


@pytest.mark.parametrize(
    ("files", "membership", "count"),
    [
        ({"user.slice/abc/cpu.max": "150000 100000"}, V2, 2),
        ({"user.slice/abc/cpu.max": "10000 100000"}, V2, 1),
        ({"user.slice/abc/cpu.max": "max 100000"}, V2, 16),
        ({"user.slice/abc/cpu.max": "max 100000", "user.slice/cpu.max": "400000 100000"}, V2, 4),
        ({"cpu.max": "300000 100000"}, "0::/\n", 3),
        ({"cpu.max": "300000 100000"}, V2, 3),
        ({"unified/cpu.max": "300000 100000"}, "0::/\n", 3),
        ({"cpu.max": "3200000 100000"}, "0::/\n", 16),
        ({"cpu.max": "nonsense"}, "0::/\n", 16),
        ({"cpu.max": "100000 0"}, "0::/\n", 16),
        (
            {
                "cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "250000",
                "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000",
            },
            V1,
            3,
        ),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "50000"}, V1, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, V1, 16),
        ({"cpuset/docker/abc/cpu.cfs_quota_us": "1"}, V1, 16),
        ({}, V2, 16),
        ({}, "", 16),
    ],
)
def test_processors_by_quota(
    tmp_path: Path, many_cpus: int, files: dict[str, str], membership: str, count: int
) -> None:
    assert available_cpus(*write(tmp_path, files, membership)) == count


def test_processors_by_affinity(tmp_path: Path) -> None:
    script = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from treeq_export.environment import available_cpus, settle_threads;"
        "settle_threads(); print(available_cpus(), os.environ['OMP_NUM_THREADS'])"
    )
    plain = {name: text for name, text in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=plain
    )
    assert done.stdout == "1 1\n"
    none = tmp_path / "absent"
    assert available_cpus(none, none) == CPUS


@pytest.mark.parametrize(
    ("files", "membership", "limit"),
    [
        ({"user.slice/abc/memory.max": "1000000"}, V2, 1000000),
        ({"user.slice/abc/memory.max": "max", "memory.max": "5000"}, V2, 5000),
        ({"memory/docker/abc/memory.limit_in_bytes": "4096"}, V1, 4096),
        ({"memory/memory.limit_in_bytes": "9223372036854771712"}, V1, RAM),
        ({}, V2, RAM),
    ],
)
def test_memory(tmp_path: Path, files: dict[str, str], membership: str, limit: int) -> None:
    assert available_memory(*write(tmp_path, files, membership)) == limit


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({}, {"OMP_NUM_THREADS": "16", "GOMP_SPINCOUNT": "3000"}),
        ({"OMP_NUM_THREADS": "8"}, {"GOMP_SPINCOUNT": "3000"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_NUM_THREADS": "16"}),
        ({"OMP_NUM_THREADS": "8", "GOMP_SPINCOUNT": "7"}, {}),
    ],
)
def test_openmp_spins_shortly_where_the_user_says_nothing(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], chosen: dict[str, str]
) -> None:
    monkeypatch.setattr(environment, "available_cpus", lambda: 16)
    variables = dict(given)
    settle_threads(variables)
    assert variables == given | chosen


@pytest.mark.parametrize("count", [1, 7])
def test_threads_of_openmp_are_those_of_other_runtimes(count: int) -> None:
    assert default_threads({"OMP_NUM_THREADS": str(count)}) == count


@pytest.mark.parametrize("text", ["", "0", "4,2", "many"])
def test_threads_of_openmp_that_say_nothing(text: str, many_cpus: int) -> None:
    assert default_threads({"OMP_NUM_THREADS": text}) == available_cpus()


def test_the_command_line_settles_threads_before_pytorch_is_loaded() -> None:
    """PyTorch reads the variables once, when it is loaded."""
    script = (
        "import os, sys; from treeq_export.cli import main; before = 'torch' in sys.modules;"
        "main(['inspect', '--schema'], standalone_mode=False);"
        "print(before, os.environ['OMP_NUM_THREADS'], file=sys.stderr)"
    )
    plain = {name: text for name, text in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=plain
    )
    assert done.stderr == f"False {available_cpus()}\n"


@pytest.mark.parametrize(
    ("cpus", "given", "blas"),
    [
        (2, {}, "1"),
        (16, {}, None),
        (2, {"OMP_NUM_THREADS": "2"}, None),
        (2, {"OPENBLAS_NUM_THREADS": "2"}, "2"),
    ],
)
def test_openblas_has_one_thread_where_processors_are_few(
    monkeypatch: pytest.MonkeyPatch, cpus: int, given: dict[str, str], blas: str | None
) -> None:
    monkeypatch.setattr(environment, "available_cpus", lambda: cpus)
    variables = dict(given)
    settle_threads(variables)
    assert variables.get("OPENBLAS_NUM_THREADS") == blas
