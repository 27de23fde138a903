"""The parts of a load test: its arithmetic, its clients, what it sees of the server's memory."""

import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import psutil
import pytest

from treeq_export.client import load_memory
from treeq_export.client.load_clients import GIVE_UP_AFTER, Answer, Clients, PhaseResult, Prepare
from treeq_export.client.load_memory import (
    MemorySample,
    MemorySampler,
    find_process,
    make_trace,
    sample_tree,
)
from treeq_export.client.load_statistics import (
    latency_percentiles,
    quarter_growth,
    slope_mb_per_min,
    subtract_counters,
    sum_counters,
)
from treeq_export.client.loadtest import count_messages, make_level
from treeq_export.errors import ServeError
from treeq_export.records.loadtest import ModelLoad, describe_errors

MS = 1_000_000  # nanoseconds


def version_statistics(requests: int, executions: int, *, failed: int = 0) -> dict[str, Any]:
    """Statistics of one version: 7 ms per request, of them 2 queued and 1 + 3 + 0.5 computed."""
    each = {"success": 7, "queue": 2, "compute_input": 1, "compute_infer": 3, "compute_output": 0.5}
    durations = {
        name: {"count": requests, "ns": int(requests * ms * MS)} for name, ms in each.items()
    }
    return {
        "version": "1",
        "inference_count": requests,
        "execution_count": executions,
        "inference_stats": durations | {"fail": {"count": failed, "ns": failed * MS}},
    }


class TestPercentiles:
    def test_of_one_to_a_hundred(self) -> None:
        values = np.random.default_rng(0).permutation(np.arange(1.0, 101.0)).tolist()
        assert latency_percentiles(values) == {
            "p50_ms": 50.5,
            "p90_ms": 90.1,
            "p95_ms": 95.05,
            "p99_ms": 99.01,
            "max_ms": 100.0,
        }

    def test_of_one(self) -> None:
        assert set(latency_percentiles([3.0]).values()) == {3.0}

    def test_of_none(self) -> None:
        assert set(latency_percentiles([]).values()) == {None}


class TestCounters:
    def test_difference_by_hand(self) -> None:
        before = sum_counters({"model_stats": [version_statistics(10, 10)]})
        after = sum_counters({"model_stats": [version_statistics(34, 16, failed=2)]})
        assert subtract_counters("sampler", before, after) == ModelLoad(
            name="sampler",
            num_requests=24,
            num_failed=2,
            num_inferences=24,
            num_executions=6,
            average_batch=4.0,
            total_ms=7.0,
            queue_ms=2.0,
            compute_ms=4.5,
        )

    def test_versions_are_added(self) -> None:
        both = sum_counters({"model_stats": [version_statistics(3, 2), version_statistics(4, 1)]})
        assert (both["inference_count"], both["execution_count"]) == (7, 3)
        assert both["success.ns"] == 49 * MS

    def test_idle_model_has_no_averages(self) -> None:
        zero = sum_counters({"model_stats": [{"version": "1"}]})
        load = subtract_counters("denoiser", zero, zero)
        assert load is not None
        assert (load.num_executions, load.average_batch, load.queue_ms) == (0, None, None)

    def test_model_that_was_loaded_again(self) -> None:
        before = sum_counters({"model_stats": [version_statistics(10, 10)]})
        after = sum_counters({"model_stats": [version_statistics(3, 3)]})
        assert subtract_counters("sampler", before, after) is None


class TestGrowth:
    def test_slope_of_the_second_half(self) -> None:
        seconds = [0.0, 10.0, 20.0, 30.0, 40.0]
        # From 20 s on: 5, 6, 7 MB, that is 1 MB in 10 s; what was before does not matter.
        assert slope_mb_per_min(seconds, [90e6, 1e6, 5e6, 6e6, 7e6]) == 6.0

    def test_slope_by_hand_where_points_are_no_line(self) -> None:
        # From 0 on: times -1, 0, 1 about their mean, sizes 0, 3, 3 MB. The slope is
        # (-1 * 0 + 0 * 3 + 1 * 3) / (1 + 0 + 1) = 1.5 MB/s.
        assert slope_mb_per_min([-2, -1, 0, 1, 2], [0, 0, 0, 3e6, 3e6]) == 90.0

    @pytest.mark.parametrize("num", [0, 1])
    def test_no_slope_of_too_few(self, num: int) -> None:
        assert slope_mb_per_min([0.0] * num, [1.0] * num) is None

    def test_growth_between_quarters(self) -> None:
        sizes = [10, 30, 20, 500, 500, 500, 500, 500, 500, 24, 26, 25]
        assert quarter_growth(sizes) == (5.0, 0.25)

    def test_no_growth_of_too_few(self) -> None:
        assert quarter_growth([1, 2, 3]) is None


class Sender:
    """Answers at once, and keeps which thread sent what."""

    def __init__(self, fail: Callable[[int], bool] = lambda _number: False) -> None:
        self.fail = fail
        self.lock = threading.Lock()
        self.sent: dict[int, list[int]] = {}
        self.num_open = self.most_open = self.num_sending = self.most_sending = 0
        self.error: BaseException = ServeError("http://x: down", kind="unreachable")

    @contextmanager
    def connect(self) -> Generator[Prepare]:
        with self.lock:
            self.num_open += 1
            self.most_open = max(self.most_open, self.num_open)
        yield lambda number: lambda: self.send(number)
        with self.lock:
            self.num_open -= 1

    def send(self, number: int) -> None:
        with self.lock:
            self.sent.setdefault(threading.get_ident(), []).append(number)
            self.num_sending += 1
            self.most_sending = max(self.most_sending, self.num_sending)
        fails = self.fail(number)
        with self.lock:
            self.num_sending -= 1
        if fails:
            raise self.error


class TestClients:
    def test_each_has_its_numbers_and_one_request_at_a_time(self) -> None:
        sender = Sender()
        with Clients(sender.connect, 3) as clients:
            result = clients.run(0.05, 100, lambda _seconds: None)
        assert result.complete
        assert sender.most_open == 3
        assert sender.num_open == 0  # connections are closed
        assert sender.most_sending <= 3
        assert len(sender.sent) == 3
        for numbers in sender.sent.values():
            assert numbers == list(range(numbers[0], numbers[0] + 3 * len(numbers), 3))
        assert sorted(numbers[0] for numbers in sender.sent.values()) == [100, 101, 102]
        assert len(result.answers) == sum(map(len, sender.sent.values()))
        times = [answer.sent_s for answer in result.answers]
        assert times == sorted(times)

    def test_phases_use_the_same_threads_and_do_not_overlap(self) -> None:
        sender = Sender()
        with Clients(sender.connect, 2) as clients:
            warm = clients.run(0.05, 1000, lambda _seconds: None)
            assert sender.num_sending == 0
            result = clients.run(0.05, 0, lambda _seconds: None)
        assert len(sender.sent) == 2
        last = max(answer.sent_s + answer.latency_s for answer in warm.answers)
        assert last <= result.answers[0].sent_s

    def test_failures_are_counted_and_followed_by_a_pause(self) -> None:
        sender = Sender(fail=lambda number: number % 2 == 1)
        with Clients(sender.connect, 1) as clients:
            result = clients.run(1.0, 0, lambda _seconds: None)
        assert result.complete
        errors = [answer.error for answer in result.answers]
        assert errors[:3] == [None, "http://x: down", None]
        assert len(errors) < 20  # without a pause there would be thousands

    def test_giving_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("treeq_export.client.load_clients._PAUSE_S", 0.0)
        sender = Sender(fail=lambda number: number >= 4)
        with Clients(sender.connect, 2) as clients:
            result = clients.run(600.0, 0, lambda _seconds: None)
        assert not result.complete
        assert [answer.error for answer in result.answers].count(None) == 4
        assert len(result.answers) == 4 + 2 * GIVE_UP_AFTER

    def test_other_errors_are_raised(self) -> None:
        sender = Sender(fail=lambda _number: True)
        sender.error = ZeroDivisionError("a bug")
        with (
            pytest.raises(ZeroDivisionError, match="a bug"),
            Clients(sender.connect, 2) as clients,
        ):
            clients.run(600.0, 0, lambda _seconds: None)

    def test_interruption_stops_them(self) -> None:
        def interrupt(_seconds: float) -> None:
            raise KeyboardInterrupt

        sender = Sender()
        with pytest.raises(KeyboardInterrupt), Clients(sender.connect, 2) as clients:
            clients.run(600.0, 0, interrupt)
        assert not [each for each in threading.enumerate() if each.name == "load-client"]

    def test_interpreter_is_left_as_it_was(self) -> None:
        before = sys.getswitchinterval()
        inside: list[tuple[float, int]] = []
        sender = Sender(
            fail=lambda _number: bool(
                inside.append((sys.getswitchinterval(), gc.get_freeze_count()))
            )
        )
        with Clients(sender.connect, 1) as clients:
            clients.run(0.02, 0, lambda _seconds: None)
        assert inside[0][0] < before
        assert inside[0][1] > 0
        assert (sys.getswitchinterval(), gc.get_freeze_count()) == (before, 0)


class TestMemory:
    def test_children_are_counted(self) -> None:
        own = psutil.Process()
        alone = sample_tree(own, 0.0, own=True).num_processes
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
            assert sample_tree(own, 0.0, own=True).num_processes == alone + 1
            child.communicate(b"\n")
        assert sample_tree(own, 0.0, own=True).num_processes == alone

    @pytest.mark.parametrize("own", [True, False])
    def test_allocation_is_seen(self, own: bool) -> None:
        process = psutil.Process()
        before = sample_tree(process, 0.0, own=own)
        block = np.ones(64_000_000, np.uint8)
        after = sample_tree(process, 1.0, own=own)
        assert 60e6 < after.size - before.size < 80e6
        assert (after.pss is None) != own
        assert len(block) == 64_000_000

    def test_pages_of_files_are_left_out(self) -> None:
        sample = sample_tree(psutil.Process(), 0.0, own=True)
        assert sample.pss is not None
        assert sample.size < sample.pss

    def test_process_that_ends(self) -> None:
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
            process = psutil.Process(child.pid)
            assert sample_tree(process, 0.0, own=True).size > 0
            child.communicate(b"\n")
        assert sample_tree(process, 0.0, own=True).num_processes == 0
        trace = make_trace([MemorySample(0.0, 5, 6, 1), MemorySample(1.0, 0, 0, 0)], own=True)
        assert (trace.seconds, trace.bytes, trace.pss_bytes) == ([0.0], [5], [6])
        assert (trace.slope_mb_per_min, trace.growth_bytes) == (None, None)

    def test_sampler(self) -> None:
        with MemorySampler(psutil.Process(), interval_s=0.01) as sampler:
            gate = threading.Event()
            while len(sampler.trace().bytes) < 4:
                gate.wait(0.01)
        trace = sampler.trace()
        assert trace.kind == "own"
        assert trace.growth_bytes is not None
        assert len(trace.seconds) == len(trace.bytes) == len(trace.pss_bytes)

    def test_system_that_does_not_say(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(load_memory, "read_rollup", lambda _pid: None)
        with MemorySampler(psutil.Process(), interval_s=60.0) as sampler:
            pass
        trace = sampler.trace()
        assert (trace.kind, trace.pss_bytes) == ("rss", [])
        assert trace.bytes[0] > 1e6

    def test_no_such_process(self) -> None:
        with pytest.raises(ServeError, match="server-pid: received 99999999, expected a process"):
            find_process(99_999_999)


class TestLevel:
    def test_by_hand(self) -> None:
        answers = [
            Answer(10.0, 0.004),
            Answer(10.1, 0.5, "http://x: down"),
            Answer(10.2, 0.002),
            Answer(11.9, 0.1, "http://x: late"),
            Answer(12.0, 0.1, "http://x: down"),
        ]
        result = PhaseResult(answers, duration_s=2.0, cpu_s=0.01, complete=True)
        load = ModelLoad(
            name="sampler",
            num_requests=2,
            num_failed=0,
            num_inferences=2,
            num_executions=1,
            average_batch=2.0,
            total_ms=2.5,
            queue_ms=0.0,
            compute_ms=2.0,
        )
        level = make_level(2, result, [load], None)
        assert level.latencies_ms == [4.0, 2.0]  # in the order in which they were sent
        assert (level.num_requests, level.num_errors) == (2, 3)
        assert level.errors == {"http://x: down": 2, "http://x: late": 1}
        assert (level.images_per_s, level.p50_ms, level.max_ms) == (1.0, 3.0, 4.0)
        assert (level.client.cpu_ms, level.client.cpu_share) == (2.0, 0.005)
        assert level.client.outside_ms == 0.5
        # In mode bls Triton does not time a request of the sampler.
        assert make_level(2, result, [load], None, answers_inside=False).client.outside_ms is None
        failure = describe_errors([level])
        assert failure == (
            "3 of 5 requests failed, first at concurrency 2: http://x: down (2x), and 1 more kinds "
            "of message"
        )

    def test_nothing_answered(self) -> None:
        level = make_level(1, PhaseResult([], 0.0, 0.0, complete=False), [], None)
        assert (level.images_per_s, level.p50_ms, level.client.outside_ms) == (0.0, None, None)
        assert describe_errors([level]) == (
            "0 of 0 requests failed, first at concurrency 1: no message"
        )
        assert describe_errors([]) is None

    def test_many_messages(self) -> None:
        messages = ["often"] * 3 + [f"request {number}" for number in range(30)]
        counts = count_messages(messages)
        assert len(counts) == 21
        assert sum(counts.values()) == 33
        assert counts["often"] == 3
        assert counts["11 other messages"] == 11
