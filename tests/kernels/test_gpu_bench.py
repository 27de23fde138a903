"""The GPU benchmarks without a GPU: statistics, records, arguments, and all of it emulated."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from treeq_export.bench.gpu_timing import (
    EmulatedTimer,
    describe_gpu_environment,
    ratios,
    read_gpu_state,
    time_interleaved,
)

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "kernels" / "bench"
SCRIPT = str(BENCH / "gpu.py")
SMOKE = ("--device", "interpreter", "--smoke")


def run_script(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels" / "gpu")))
    return subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


class FakeTimer:
    """Names its calls in order, and gives them the times that a test wants."""

    def __init__(self, times: dict[str, float]) -> None:
        self.times = times
        self.order: list[list[str]] = [[]]
        self.last = ""

    def start(self, call: Callable[[], object]) -> None:
        call()
        self.order[-1].append(self.last)

    def finish(self) -> list[float]:
        done = self.order[-1]
        self.order.append([])
        return [self.times[name] + 0.001 * len(self.order) for name in done]


def make_calls(timer: FakeTimer) -> dict[str, Callable[[], object]]:
    def make(name: str) -> Callable[[], object]:
        return lambda: setattr(timer, "last", name)

    return {name: make(name) for name in timer.times}


class TestTiming:
    def test_times_belong_to_their_calls(self):
        timer = FakeTimer({"a": 1.0, "b": 2.0, "c": 4.0})
        times = time_interleaved(make_calls(timer), timer, rounds=6, warmup=2)
        assert {name: len(values) for name, values in times.items()} == {"a": 6, "b": 6, "c": 6}
        for name, values in times.items():
            np.testing.assert_allclose(values, timer.times[name], atol=0.02)
        # Two rounds of warming up are not counted: the third round's times come first.
        assert times["a"][0] == pytest.approx(1.0 + 0.001 * 4)

    def test_every_round_runs_all_in_changing_order(self):
        timer = FakeTimer(dict.fromkeys("abcd", 1.0))
        time_interleaved(make_calls(timer), timer, rounds=4, warmup=0)
        rounds = timer.order[:4]
        assert all(sorted(done) == ["a", "b", "c", "d"] for done in rounds)
        assert len({tuple(done) for done in rounds}) == 4
        assert {done[0] for done in rounds} == {"a", "b", "c", "d"}

    def test_emulated_timer_runs_and_measures_nothing(self):
        ran: list[int] = []
        times = time_interleaved({"a": lambda: ran.append(1)}, EmulatedTimer(), rounds=3, warmup=1)
        assert times == {"a": []}
        assert len(ran) == 4

    def test_ratios_carry_their_interval(self):
        rng = np.random.default_rng(0)
        times = {
            "bf16": (2 + 0.01 * rng.standard_normal(50)).tolist(),
            "ours": (1 + 0.01 * rng.standard_normal(50)).tolist(),
            "empty": [],
        }
        found = ratios(times, "bf16")
        assert list(found) == ["ours"]
        assert found["ours"]["low"] <= found["ours"]["ratio"] <= found["ours"]["high"]
        assert found["ours"]["ratio"] == pytest.approx(2, abs=0.03)
        assert ratios(times, "missing") == {}
        assert ratios({"bf16": [], "ours": []}, "bf16") == {}

    def test_environment_without_a_gpu(self):
        environment = describe_gpu_environment()
        assert (environment["gpu"] is None) == (not torch.cuda.is_available())
        assert environment["torch"] == torch.__version__.split("+")[0] or environment["torch"]

    def test_gpu_state_without_the_tool(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("PATH", "")
        assert read_gpu_state() is None

    def test_gpu_state_is_what_the_tool_says(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        tool = tmp_path / "nvidia-smi"
        tool.write_text("#!/bin/sh\necho '580.1, 1980 MHz, 2619 MHz, 70 W, 31'\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        state = read_gpu_state()
        assert state is not None
        assert state["clocks.sm"] == "1980 MHz"
        assert state["temperature.gpu"] == "31"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function: name of a module of kernels/bench -> the module."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    yield importlib.import_module
    for name in [name for name in sys.modules if name.startswith("gpu_")]:
        del sys.modules[name]


def make_row(target: str, m: int, ratio: float, shape: str = "fc1") -> dict[str, Any]:
    interval = {"ratio": ratio, "low": ratio - 0.1, "high": ratio + 0.1}
    return {"target": target, "shape": shape, "m": m, "speedup": {"bf16": interval}}


class TestSummary:
    def test_goals_and_layers_without_gain(self, bench: Any):
        rows = [
            make_row("w3a3", 1, 3.5),
            make_row("w3a3", 16, 2.9),
            make_row("w3a3", 256, 0.9),
            make_row("w3a3", 512, 1.0),
            make_row("w3a3", 1024, 1.31),
            make_row("w4a4", 2048, 0.8),
            make_row("w3a3_product", 2048, 0.5),
            make_row("quantize_token_rms", 2048, 0.5),
            make_row("fp16", 2048, 0.99),
            {"target": "int_mm", "shape": "fc1", "m": 1, "missing": "17 rows"},
        ]
        summary = bench("gpu_summary").summarise(rows)
        assert [(goal["m"], goal["limit"], goal["passed"]) for goal in summary["goals"]] == [
            (1, 3.0, True),
            (16, 3.0, False),
            (512, 1.0, True),
            (1024, 1.3, True),
        ]
        assert summary["goals_met"] == 3
        assert summary["without_gain"] == [
            "w3a3 fc1 M=256: 0.90",
            "w3a3 fc1 M=512: 1.00",
            "w4a4 fc1 M=2048: 0.80",
        ]
        assert summary["missing"] == {"int_mm": "17 rows"}

    def test_opcodes_and_shapes_without_gain_are_printed(
        self, bench: Any, capsys: pytest.CaptureFixture[str]
    ):
        module = bench("gpu_summary")
        rows = [make_row("w3a3", 256, 0.9), make_row("w3a3", 512, 1.0), make_row("w4a4", 1, 0.8)]
        kernels = [
            {"kernel": "qlinear_w3_wide", "mma": {"IGMMA": 8}},
            {"kernel": "qlinear_w4_wide", "mma": {"IGMMA": 8}},
            {"kernel": "quantize_rms", "mma": {}},
        ]
        summary = module.summarise(rows, kernels)
        assert summary["mma"]["qlinear_w3_wide"] == "IGMMA"
        integers = {"num_cases": 1, "failures": []}
        record = {"rows": rows, "summary": summary, "integers": integers}
        module.print_summary(record | {"emulated": False})
        lines = capsys.readouterr().out.splitlines()
        assert "  w3a3 fc1 M=256,512" in lines
        assert "  w4a4 fc1 M=1" in lines
        assert "MMA IGMMA: qlinear_w3_wide, qlinear_w4_wide" in lines
        assert "MMA none: quantize_rms" in lines

    def test_table(self, bench: Any):
        record = {"rows": [make_row("w3a3", 1, 3.5), make_row("fp16", 1, 1.0)]}
        lines = bench("gpu_summary").table(record)
        assert lines[1].split() == ["shape", "M", "w3a3", "fp16"]
        assert lines[2].split() == ["fc1", "1", "3.50", "1.00"]

    def test_rows_of_one_run_are_compared(self, bench: Any):
        times = {"bf16": [2.0, 2.0, 2.0], "w3a3": [1.0, 1.0, 1.0]}
        rows = bench("gpu_qlinear").make_rows("fc1", 1152, 4608, 1024, times, {"tensorrt": "no"})
        by_target = {row["target"]: row for row in rows}
        assert by_target["w3a3"]["speedup"]["bf16"]["ratio"] == 2.0
        assert by_target["w3a3"]["median_ms"] == 1.0
        assert by_target["w3a3"]["tops"] == pytest.approx(2e-9 * 1152 * 4608 * 1024)
        assert by_target["bf16"]["speedup"] == {}
        assert by_target["tensorrt"]["missing"] == "no"


class TestCheck:
    def test_failures_are_named(self, bench: Any):
        good = {
            "shape": "q",
            "format": "w3a3",
            "m": 1,
            "codes_repeat": True,
            "equal_code_fraction": 1.0,
            "sums_equal": True,
            "launched_sums_equal": True,
            "sqnr_db": 55.0,
        }
        failures = bench("gpu_check").failures
        assert failures([good, good | {"launched_sums_equal": None}]) == []
        wrong = {
            "codes_repeat": False,
            "equal_code_fraction": 0.9,
            "sums_equal": False,
            "launched_sums_equal": False,
            "sqnr_db": float("nan"),
        }
        for key, value in wrong.items():
            [line] = failures([good | {key: value}])
            assert line.startswith("q w3a3 M=1: ")

    def test_reference_sums_are_exact(self, bench: Any):
        rng = np.random.default_rng(0)
        codes = rng.integers(-128, 128, (3, 4608)).astype(np.int8)
        weight = rng.integers(-128, 128, (5, 4608)).astype(np.int8)
        sums = bench("gpu_check").reference_sums(torch.from_numpy(codes), weight)
        expected = codes.astype(np.int64) @ weight.astype(np.int64).T
        np.testing.assert_array_equal(sums.numpy(), expected)

    def test_all_shapes_of_the_network_are_there(self, bench: Any):
        cases = bench("gpu_cases")
        assert set(cases.SHAPES.values()) == {
            (1152, 1152),
            (1152, 3456),
            (1152, 4608),
            (4608, 1152),
            (1152, 6912),
        }
        assert tuple(1 << power for power in range(13)) == cases.TOKENS
        assert {1, 4096} <= set(cases.CHECKED_TOKENS)
        assert sum(m % 2 for m in cases.CHECKED_TOKENS) > 10

    def test_every_kernel_is_warmed_once(self, bench: Any):
        module = bench("gpu_qlinear")
        linears = module.Linears(torch.device("cpu"), module.SHAPES, module.TOKENS, (3,), 1)
        cases = module.representatives(linears, 132)
        assert len(cases) == len(set(cases))
        assert {index for index, *_ in cases} == {0, 1, 2, 3}
        choose, formats = module.choose.choose_qlinear, module.FORMATS
        names = {
            choose(formats[i].layer(k, n), m, 132, "bf16")[0].kernel.name for i, k, n, m in cases
        }
        for k, n in module.SHAPES.values():
            for fmt in module.FORMATS:
                for m in module.TOKENS:
                    assert choose(fmt.layer(k, n), m, 132, "bf16")[0].kernel.name in names


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole linear benchmark in Triton's interpreter, on small shapes."""
    out = tmp_path_factory.mktemp("gpu_qlinear")
    done = run_script(sys.executable, SCRIPT, *SMOKE, "--part", "linears", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "emulated, untimed" in done.stdout
    return out


@pytest.mark.slow
def test_the_emulated_record_is_complete_and_untimed(emulated: Path):
    record = json.loads((emulated / "bench.json").read_bytes())
    assert record["emulated"] is True
    assert record["integers"]["failures"] == []
    assert record["integers"]["num_cases"] == 2 * 4 * 2
    targets = {row["target"] for row in record["rows"]}
    assert targets >= {"w2a4", "w3a3", "w4a4", "w8a8", "w3a3_product", "fp16", "bf16", "int_mm"}
    assert targets >= {"quantize_token_rms", "quantize_token_absmax"}
    timed = [row for row in record["rows"] if "missing" not in row]
    assert all(row["median_ms"] is None and row["all_times_ms"] == [] for row in timed)
    assert record["summary"]["goals"] == []
    assert {"tensorrt_fp16", "tensorrt_fp8"} <= set(record["summary"]["missing"])


def test_without_a_gpu_it_is_one_line(tmp_path: Path):
    done = run_script(sys.executable, SCRIPT, "--out", str(tmp_path), CUDA_VISIBLE_DEVICES="-1")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no CUDA GPU" in done.stderr


@pytest.mark.slow
def test_end_to_end_emulated(tmp_path: Path):
    """One block with our layers at 3 bits, with a branch, and compiled around."""
    only = "eager_bf16,w3a3,w3a3_r16"
    chosen = ("--part", "network", "--only", only)
    done = run_script(sys.executable, SCRIPT, *SMOKE, *chosen, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "end_to_end.json").read_bytes())
    assert record["emulated"] is True
    assert [row["target"] for row in record["rows"]] == only.split(",")
    assert all(row["finite"] and row["median_ms"] is None for row in record["rows"])
    eager, ours, branch = (row["weight_bytes"] for row in record["rows"])
    assert ours < branch < eager


class TestRtx:
    def test_an_engine_that_cannot_be_opened_is_a_finding(self, bench: Any, tmp_path: Path):
        row = bench("gpu_rtx").try_engine(tmp_path, tmp_path)
        assert row["loaded"] is False
        assert row["engine"] == tmp_path.name
        assert "status 1" in row["error"]

    def test_a_child_that_does_not_end(self, bench: Any, tmp_path: Path):
        row = bench("gpu_rtx").try_engine(tmp_path, tmp_path, timeout_s=0.01)
        assert row == {
            "engine": tmp_path.name,
            "loaded": False,
            "error": "no end after 0.01 s",
        }
