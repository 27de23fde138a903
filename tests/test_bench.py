"""Bench: fair rounds, honest ratios, the peer, memory in a process of its own."""

import errno
import gc
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise, permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization
from onnxruntime.quantization import quantize_static, shape_inference

from tests.commands import measure_nothing
from treeq_export.bench import memory, memory_child, timing
from treeq_export.bench.memory import measure_memory
from treeq_export.bench.peer import make_int8_peer, model_files
from treeq_export.bench.stage import compare_rows, run_bench
from treeq_export.bench.timing import compare_times, round_order, time_rounds, wait_until_idle
from treeq_export.environment import describe_environment, read_cpu, read_peak_bytes, warn_if_busy
from treeq_export.errors import OutOfMemoryError, OutputError, PlanError, RunnerError, TreeqError
from treeq_export.model.zoo import Denoiser
from treeq_export.quant.metrics import sqnr_db
from treeq_export.recipe import BenchSection, ModelSection
from treeq_export.records import BenchRecord, BenchRow, load_record
from treeq_export.runners.ort_runner import OrtRunner

TARGETS = ("torch_fp32", "ort_fp32", "ort_int8", "portable")
CHANNELS, SIZE = 4, 8
MakeDenoiser = Callable[..., Denoiser]


def write_graph(
    path: Path, *, seed: int = 0, width: int = 32, out_channels: int = 8, external: bool = False
) -> Path:
    """Write two MatMuls over the last axis with the tiny DiT's inputs and output shape."""
    rng = np.random.default_rng(seed)
    weights = {
        "up": rng.standard_normal((SIZE, width), dtype=np.float32),
        "down": rng.standard_normal((width, SIZE), dtype=np.float32) / math.sqrt(width),
    }
    copies = out_channels // CHANNELS
    nodes = [
        helper.make_node("MatMul", ["sample", "up"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("MatMul", ["active", "down"], ["mixed"]),
        helper.make_node("Concat", ["mixed"] * copies, ["prediction"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["b", CHANNELS, SIZE, SIZE]),
            helper.make_tensor_value_info("timestep", TensorProto.FLOAT, ["b"]),
            helper.make_tensor_value_info("class_labels", TensorProto.INT64, ["b"]),
        ],
        [
            helper.make_tensor_value_info(
                "prediction", TensorProto.FLOAT, ["b", out_channels, SIZE, SIZE]
            )
        ],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(
        model,
        path,
        save_as_external_data=external,
        location=f"{path.name}.data" if external else None,
        size_threshold=0,
    )
    return path


def make_inputs(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((batch, CHANNELS, SIZE, SIZE), dtype=np.float32),
        "timestep": np.full(batch, 500.0, dtype=np.float32),
        "class_labels": np.arange(batch),
    }


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("bench")
    write_graph(run / "onnx/fp32/model.onnx")
    write_graph(run / "onnx/portable/model.onnx")
    return run


@pytest.fixture(scope="module")
def steps() -> list[float]:
    return []


@pytest.fixture(scope="module")
def record(
    run_folder: Path, make_tiny_denoiser: MakeDenoiser, tiny_checkpoints: Path, steps: list[float]
) -> BenchRecord:
    """One bench of four targets at two batch sizes; its processes for memory are not started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("treeq_export.bench.stage.measure_memory", measure_nothing)
        return run_bench(
            run_folder,
            make_tiny_denoiser("dit"),
            BenchSection(batch_sizes=[1, 2], rounds=5, warmup=1, threads=1),
            targets=TARGETS,
            seed=3,
            on_step=steps.append,
            model=ModelSection(checkpoint=str(tiny_checkpoints / "dit")),
        )


class TestRunBench:
    def test_one_row_per_target_and_batch(self, record: BenchRecord) -> None:
        assert [(row.target, row.batch) for row in record.rows] == [
            (target, batch) for batch in (1, 2) for target in TARGETS
        ]

    def test_rows_hold_all_counted_rounds_and_their_median(self, record: BenchRecord) -> None:
        for row in record.rows:
            assert len(row.all_times_ms) == 5
            assert min(row.all_times_ms) > 0
            assert row.median_ms == sorted(row.all_times_ms)[2]

    def test_ratios_are_those_of_the_medians_inside_their_intervals(
        self, record: BenchRecord
    ) -> None:
        medians = {(row.target, row.batch): row.median_ms for row in record.rows}
        assert len(record.speedups) == 2 * (1 + 1 + 2 + 3)
        for speedup in record.speedups:
            expected = (
                medians[speedup.baseline, speedup.batch] / medians[speedup.target, speedup.batch]
            )
            assert speedup.ratio == pytest.approx(expected)
            assert 0 < speedup.low <= speedup.ratio <= speedup.high

    def test_memory_is_asked_for_every_target(self, record: BenchRecord) -> None:
        assert record.memory == [measure_nothing(target) for target in TARGETS]

    @pytest.mark.slow
    def test_memory_of_every_target(
        self,
        run_folder: Path,
        make_tiny_denoiser: MakeDenoiser,
        tiny_checkpoints: Path,
        tmp_path: Path,
    ) -> None:
        run = Path(shutil.copytree(run_folder, tmp_path / "run"))
        record = run_bench(
            run,
            make_tiny_denoiser("dit"),
            BenchSection(batch_sizes=[1], rounds=3, warmup=1, threads=1),
            targets=TARGETS,
            seed=3,
            on_step=lambda _: None,
            model=ModelSection(checkpoint=str(tiny_checkpoints / "dit")),
        )
        assert [entry.target for entry in record.memory] == list(TARGETS)
        for entry in record.memory:
            assert 0 < entry.after_load_bytes <= entry.peak_bytes < 2**30
            assert entry.load_s > 0
        portable = run / "onnx/portable/model.onnx"
        assert record.memory[-1].file_bytes == portable.stat().st_size

    def test_record_is_saved(self, record: BenchRecord, run_folder: Path) -> None:
        assert load_record(run_folder / "bench.json", BenchRecord, "bench") == record

    def test_progress_ends_at_one(self, record: BenchRecord, steps: list[float]) -> None:
        assert record.rows
        assert steps == sorted(steps)
        assert len(steps) == len(TARGETS) * (2 * 6 + 1)
        assert steps[-1] == 1.0

    def test_environment_says_how_it_was_measured(self, record: BenchRecord) -> None:
        environment = record.environment
        assert (environment["rounds"], environment["warmup"], environment["seed"]) == (5, 1, 3)
        assert environment["threads"] == 1

    @pytest.mark.parametrize("targets", [("ort",), ("ort_fp32",), ("ort_int8",)])
    def test_missing_graph_names_compile(
        self, tmp_path: Path, make_tiny_denoiser: MakeDenoiser, targets: Sequence[str]
    ) -> None:
        with pytest.raises(PlanError, match=rf"{targets[0]}.*treeq-export compile --run") as caught:
            run_bench(
                tmp_path,
                make_tiny_denoiser("dit"),
                BenchSection(),
                targets=targets,
                seed=0,
                on_step=lambda _: None,
            )
        assert "\n" not in str(caught.value)

    def test_output_of_another_shape_is_refused(
        self, tmp_path: Path, make_tiny_denoiser: MakeDenoiser
    ) -> None:
        write_graph(tmp_path / "onnx/portable/model.onnx", out_channels=4)
        with pytest.raises(RunnerError, match=r"portable: returned shape \(2, 4, 8, 8\)"):
            run_bench(
                tmp_path,
                make_tiny_denoiser("dit"),
                BenchSection(rounds=3, threads=1),
                targets=("torch_fp32", "portable"),
                seed=0,
                on_step=lambda _: None,
            )
        assert not (tmp_path / "bench.json").exists()

    def test_torch_memory_needs_the_model_section(
        self, tmp_path: Path, make_tiny_denoiser: MakeDenoiser
    ) -> None:
        record = run_bench(
            tmp_path,
            make_tiny_denoiser("dit"),
            BenchSection(rounds=3, warmup=1, threads=1),
            targets=("torch_fp32",),
            seed=0,
            on_step=lambda _: None,
        )
        assert (len(record.rows), record.memory, record.speedups) == (1, [], [])


class TestRounds:
    @given(num=st.integers(1, 9), index=st.integers(0, 40))
    def test_every_callable_once(self, num: int, index: int) -> None:
        assert sorted(round_order(num, index)) == list(range(num))

    @given(num=st.integers(2, 9))
    def test_every_neighbour_equally_often(self, num: int) -> None:
        rounds = num if num % 2 == 0 else 2 * num
        followers = [pair for index in range(rounds) for pair in pairwise(round_order(num, index))]
        counts = {pair: followers.count(pair) for pair in permutations(range(num), 2)}
        assert set(counts.values()) == {rounds // num}

    def test_warmup_is_called_but_not_counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(timing, "wait_until_idle", lambda: True)
        called: list[str] = []
        turns: list[int] = []
        times = time_rounds(
            {name: (lambda name=name: called.append(name)) for name in "abc"},
            rounds=6,
            warmup=2,
            on_turn=lambda: turns.append(1),
        )
        assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", 6)
        assert len(turns) == 3 * 8
        # Each turn is one uncounted and one timed call.
        assert called[::2] == called[1::2]
        orders = [tuple(called[start : start + 6 : 2]) for start in range(0, len(called), 6)]
        assert all(sorted(order) == list("abc") for order in orders)
        assert {order[0] for order in orders} == set("abc")

    def test_times_are_the_second_call_in_milliseconds(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(timing, "wait_until_idle", lambda: True)
        readings = iter([10_000_000, 13_500_000] * 3)
        times = time_rounds(
            {"a": lambda: None},
            rounds=3,
            warmup=0,
            on_turn=lambda: None,
            clock=lambda: next(readings),
        )
        assert times == {"a": [3.5, 3.5, 3.5]}

    def test_garbage_collection_is_off_and_comes_back(self) -> None:
        seen: list[bool] = []

        def fail() -> None:
            seen.append(gc.isenabled())
            raise RunnerError("stop")

        with pytest.raises(RunnerError, match="stop"):
            time_rounds({"a": fail}, rounds=3, warmup=0, on_turn=lambda: None)
        assert seen == [False]
        assert gc.isenabled()


class TestWaitUntilIdle:
    def fake_clock(self, cpu_per_sleep: Iterator[float]) -> SimpleNamespace:
        """A clock on which sleeping passes wall time and a given CPU time."""
        now = {"wall": 0.0, "cpu": 0.0}

        def sleep(seconds: float) -> None:
            now["wall"] += seconds
            now["cpu"] += next(cpu_per_sleep)

        return SimpleNamespace(
            perf_counter=lambda: now["wall"], process_time=lambda: now["cpu"], sleep=sleep
        )

    def test_waits_while_threads_spin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        spins = iter([0.002, 0.002, 0.0])
        monkeypatch.setattr(timing, "time", self.fake_clock(spins))
        assert wait_until_idle()
        assert list(spins) == []

    def test_gives_up_at_the_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(timing, "time", self.fake_clock(iter([0.002] * 100)))
        assert not wait_until_idle(limit_s=0.1)


class TestCompareTimes:
    def test_rounds_are_paired(self) -> None:
        baseline = [10.0, 90.0, 20.0, 45.0, 33.0]
        ratio = compare_times(baseline, [time / 2 for time in baseline], seed=0)
        # A slow round slows both sides: the ratio is exact however the rounds are drawn.
        assert (ratio.low, ratio.ratio, ratio.high) == (2.0, 2.0, 2.0)

    def test_interval_is_seeded_and_as_wide_as_the_noise(self) -> None:
        rng = np.random.default_rng(0)
        baseline = list(20 + rng.standard_normal(40))
        target = list(10 + rng.standard_normal(40))
        ratio = compare_times(baseline, target, seed=1)
        assert ratio == compare_times(baseline, target, seed=1)
        assert 1.7 < ratio.low < ratio.ratio < ratio.high < 2.3

    @given(
        times=st.lists(
            st.tuples(st.floats(0.1, 100.0), st.floats(0.1, 100.0)), min_size=3, max_size=6
        )
    )
    def test_interval_contains_the_ratio(self, times: list[tuple[float, float]]) -> None:
        ratio = compare_times(*zip(*times, strict=True), seed=0)
        assert ratio.low <= ratio.ratio <= ratio.high

    def test_baselines_of_each_target(self) -> None:
        rows = [
            BenchRow(target=target, batch=batch, median_ms=1.0, all_times_ms=[1.0] * 3)
            for batch in (1, 2)
            for target in (*TARGETS, "ort")
        ]
        pairs = [(entry.target, entry.baseline) for entry in compare_rows(rows, 0)]
        assert pairs[: len(pairs) // 2] == [
            ("torch_fp32", "ort_fp32"),
            ("ort_fp32", "torch_fp32"),
            ("ort_int8", "torch_fp32"),
            ("ort_int8", "ort_fp32"),
            ("portable", "torch_fp32"),
            ("portable", "ort_fp32"),
            ("portable", "ort_int8"),
            ("ort", "torch_fp32"),
            ("ort", "ort_fp32"),
            ("ort", "ort_int8"),
        ]
        assert pairs[: len(pairs) // 2] == pairs[len(pairs) // 2 :]


class TestPeer:
    def quantize(self, tmp_path: Path, fp32: Path) -> Path:
        return make_int8_peer(fp32, tmp_path / "peer", [make_inputs(2, seed) for seed in range(3)])

    @pytest.mark.parametrize("external", [False, True])
    def test_every_matmul_is_quantized_per_channel(self, tmp_path: Path, external: bool) -> None:
        fp32 = write_graph(tmp_path / "fp32/model.onnx", width=256, external=external)
        assert len(model_files(fp32)) == 1 + external
        path = self.quantize(tmp_path, fp32)
        graph = onnx.load(path).graph
        weights = {init.name: init for init in graph.initializer}
        producers = {node.output[0]: node for node in graph.node}
        matmuls = [node for node in graph.node if node.op_type == "MatMul"]
        assert len(matmuls) == 2
        for node in matmuls:
            sides = [producers[name] for name in node.input]
            assert {side.op_type for side in sides} == {"DequantizeLinear"}
            codes, scale = (weights[name] for name in sides[1].input[:2])
            assert codes.data_type == TensorProto.INT8
            assert numpy_helper.to_array(scale).shape == (codes.dims[1],)
        inputs = make_inputs(4, seed=9)
        with OrtRunner(fp32, threads=1) as full, OrtRunner(path, threads=1) as peer:
            assert sqnr_db(full.run(inputs), peer.run(inputs)) > 25
        assert sorted(file.name for file in path.parent.iterdir()) == sorted(
            ["model.onnx", "source.json", *(["model.onnx.data"] if external else [])]
        )

    def test_is_made_again_only_when_the_graph_changed(self, tmp_path: Path) -> None:
        fp32 = write_graph(tmp_path / "fp32/model.onnx")
        path = self.quantize(tmp_path, fp32)
        made = path.stat().st_ino, path.read_bytes()
        assert self.quantize(tmp_path, fp32) == path
        assert (path.stat().st_ino, path.read_bytes()) == made
        write_graph(fp32, seed=1)
        assert self.quantize(tmp_path, fp32).read_bytes() != made[1]

    def test_damaged_source_file_is_no_cache(self, tmp_path: Path) -> None:
        fp32 = write_graph(tmp_path / "fp32/model.onnx")
        path = self.quantize(tmp_path, fp32)
        source = path.with_name("source.json")
        good = source.read_bytes()
        source.write_bytes(good[:20])
        path.write_bytes(b"")
        self.quantize(tmp_path, fp32)
        assert source.read_bytes() == good
        assert len(onnx.load(path).graph.node) > 4

    def test_unreadable_graph_is_one_line(self, tmp_path: Path) -> None:
        fp32 = tmp_path / "fp32/model.onnx"
        fp32.parent.mkdir()
        fp32.write_bytes(b"not a graph")
        with pytest.raises(RunnerError, match="quantization cannot quantize") as caught:
            self.quantize(tmp_path, fp32)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "peer").exists()

    @pytest.mark.parametrize("external", [False, True])
    def test_graph_that_cannot_be_prepared(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool
    ) -> None:
        fp32 = write_graph(tmp_path / "fp32/model.onnx", width=256, external=external)
        prepared = self.quantize(tmp_path, fp32).parent.rename(tmp_path / "prepared")
        read: list[Path] = []

        def refuse(*_: Any, **__: Any) -> None:
            raise RuntimeError("cannot prepare")

        def quantize(source: Path, *args: Any, **options: Any) -> None:
            read.append(source)
            quantize_static(source, *args, **options)

        monkeypatch.setattr(shape_inference, "quant_pre_process", refuse)
        monkeypatch.setattr(quantization, "quantize_static", quantize)
        path = self.quantize(tmp_path, fp32)
        # The tool writes beside what it reads: that is a copy.
        assert read[0].name == fp32.name
        assert read[0].parent.name == "workplace"
        assert sorted(file.name for file in path.parent.iterdir()) == sorted(
            file.name for file in prepared.iterdir()
        )

    def test_full_disk_is_told_apart(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fp32 = write_graph(tmp_path / "fp32/model.onnx")
        write_bytes = Path.write_bytes

        def write(path: Path, data: bytes) -> int:
            if path.name == "room":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write_bytes(path, data)

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("Wire format was corrupt")

        monkeypatch.setattr(quantization, "quantize_static", fail)
        with pytest.raises(RunnerError, match="Wire format was corrupt"):
            self.quantize(tmp_path, fp32)
        monkeypatch.setattr(Path, "write_bytes", write)
        with pytest.raises(OutputError, match=r"peer: the disk is full \("):
            self.quantize(tmp_path, fp32)
        assert not (tmp_path / "peer").exists()


class TestMemory:
    def test_counts_the_weights(self, tmp_path: Path) -> None:
        width = 2**18
        path = write_graph(tmp_path / "model.onnx", width=width, external=True)
        weight_bytes = 2 * SIZE * width * 4
        what = {"onnx": str(path), "options": {"use_kernels": False}}
        entry = measure_memory("portable", what, make_inputs(2), threads=1)
        assert entry.target == "portable"
        assert weight_bytes * 0.9 < entry.after_load_bytes < weight_bytes * 6
        # One activation alone is (2, 4, 8, width) float32.
        assert entry.peak_bytes > entry.after_load_bytes + 2 * CHANNELS * SIZE * width * 4 * 0.9
        assert weight_bytes < entry.file_bytes < weight_bytes * 1.01

    def test_failing_child_is_one_line(self, tmp_path: Path) -> None:
        what = {"onnx": str(tmp_path / "absent.onnx"), "options": {}}
        with pytest.raises(RunnerError, match=r"ort: .*status 1: .*absent\.onnx") as caught:
            measure_memory("ort", what, make_inputs(1), threads=1)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("kind", ["onnx", "torch"])
    def test_child_in_this_process(
        self, tmp_path: Path, tiny_checkpoints: Path, kind: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        from safetensors.numpy import save

        path = write_graph(tmp_path / "model.onnx")
        section = ModelSection(checkpoint=str(tiny_checkpoints / "dit"))
        inputs = make_inputs(2)
        what: dict[str, Any] = {"onnx": str(path), "torch": section.model_dump(mode="json")}
        order = {
            "what": {kind: what[kind], "options": {}},
            "input_names": list(inputs),
            "threads": 1,
            "num_runs": 2,
        }
        result_file = tmp_path / "result.json"
        memory_child.main(json.dumps(order), save(inputs), result_file.open("w"))
        result = json.loads(result_file.read_text())
        assert 0 <= result["after_load_bytes"] <= result["peak_bytes"] < 2**30
        weights = tiny_checkpoints / "dit/diffusion_pytorch_model.safetensors"
        assert result["file_bytes"] == (path if kind == "onnx" else weights).stat().st_size
        assert capfd.readouterr().out == ""

    def test_peak_is_read_from_the_kernels_counter(self, tmp_path: Path) -> None:
        status = tmp_path / "status"
        status.write_text("Name:\tpython\nVmHWM:\t    1200 kB\nVmRSS:\t     800 kB\n")
        assert read_peak_bytes(status) == 1200 * 1024
        assert read_peak_bytes(tmp_path / "nowhere") == 0

    def test_without_a_counter_the_present_size_is_taken(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        memory_child.reset_peak(tmp_path / "absent" / "clear_refs")
        monkeypatch.setattr(memory_child, "read_peak_bytes", lambda: 0)
        sizes = iter([100, 200, 350])
        monkeypatch.setattr(memory_child, "resident_bytes", lambda: next(sizes))
        result = memory_child.measure(nullcontext, {}, num_runs=0)
        assert (result["after_load_bytes"], result["peak_bytes"]) == (100, 250)

    @pytest.mark.parametrize(
        ("code", "error", "words"),
        [
            ("import os; os.kill(os.getpid(), 9)", OutOfMemoryError, "Lower bench.batch_sizes"),
            ("import time; time.sleep(60)", RunnerError, "took more than 0.2 s"),
            ("import sys; sys.exit('first\\nlast')", RunnerError, "status 1: last"),
        ],
    )
    def test_a_child_that_does_not_answer(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        code: str,
        error: type[TreeqError],
        words: str,
    ) -> None:
        (tmp_path / "fake_child.py").write_text(code)
        monkeypatch.setattr(memory, "_CHILD", "fake_child")
        monkeypatch.setattr(memory, "_TIMEOUT_S", 0.2 if "sleep" in code else 60)
        monkeypatch.setattr(
            memory, "_child_environment", lambda _: {**os.environ, "PYTHONPATH": str(tmp_path)}
        )
        with pytest.raises(error, match=words):
            measure_memory("ort", {"onnx": "model.onnx"}, make_inputs(1), threads=1)


class TestEnvironment:
    def test_names_neither_host_nor_folders(self) -> None:
        environment = describe_environment(threads=2)
        text = json.dumps(environment)
        assert platform.node() not in text
        assert str(Path.home()) not in text
        assert environment["threads"] == 2
        assert environment["cores"] >= 1
        assert environment["ram_bytes"] > 2**28
        assert len(environment["load_average"]) == 3
        assert environment["onnxruntime"].count(".") >= 2

    @pytest.mark.parametrize(
        ("text", "model", "sets"),
        [
            (
                "model name\t: Some CPU\nflags\t: fpu avx2 avx512_vnni\n\nflags\t: fpu\n",
                "Some CPU",
                ["avx2", "avx512_vnni"],
            ),
            ("Features\t: fp asimddp i8mm\n", platform.processor() or platform.machine(), None),
        ],
    )
    def test_reads_cpu_info(
        self, tmp_path: Path, text: str, model: str, sets: list[str] | None
    ) -> None:
        file = tmp_path / "cpuinfo"
        file.write_text(text)
        assert read_cpu(file) == (model, sets or ["asimddp", "i8mm"])

    def test_no_cpu_info(self, tmp_path: Path) -> None:
        assert read_cpu(tmp_path / "cpuinfo")[1] == []

    @pytest.mark.parametrize(("load", "busy"), [(1.9, False), (2.1, True)])
    def test_busy_machine_is_named(
        self, load: float, busy: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert warn_if_busy({"load_average": [load, 0.0, 0.0], "cores": 2}) == busy
        assert ("load average is 2.1 on 2 cores" in caplog.text) == busy
