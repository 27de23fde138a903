"""Integers and the timer on a GPU. Never ran yet: written on machines without one."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from treeq_export.bench.gpu_timing import CudaTimer, describe_gpu_environment, time_interleaved
from treeq_export.runners.cuda_runner import capture_graph

pytestmark = pytest.mark.gpu
BENCH = Path(__file__).parents[2] / "kernels" / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function: name of a module of kernels/bench -> the module."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module
    for name in [name for name in sys.modules if name.startswith("gpu_")]:
        del sys.modules[name]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("k", "n"), [(1152, 1152), (4608, 1152), (1152, 100)])
def test_integers_equal_the_reference(k: int, n: int, dtype: torch.dtype, bench: Any):
    cases, check = bench("gpu_cases"), bench("gpu_check")
    tokens = (1, 3, 16, 17, 63, 200, 511)
    for fmt in cases.FORMATS:
        rows = check.check_case("shape", fmt, k, n, tokens, torch.device("cuda"), dtype)
        assert check.failures(rows) == []
        assert all(row["launched_sums_equal"] for row in rows)


def test_timer_measures_the_gpu_alone():
    x = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    calls = {
        "one": capture_graph(lambda: x @ x),
        "four": capture_graph(lambda: x @ x @ x @ x @ x),
    }
    times = time_interleaved(calls, CudaTimer(), rounds=9, warmup=2)
    one, four = (sorted(values)[4] for values in times.values())
    assert 0 < one < four
    assert 2 < four / one < 6


def test_environment_names_the_gpu():
    gpu = describe_gpu_environment()["gpu"]
    assert gpu["architecture"].startswith("sm_")
    assert gpu["l2_bytes"] > 0
