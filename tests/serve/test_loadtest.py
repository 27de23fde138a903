"""The load test and its command, against a server made of a dictionary (no sockets).

The real server is in test_loadtest_server.py.
"""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from click.testing import CliRunner, Result

from treeq_export.cli import main
from treeq_export.client import load_clients, load_setup, loadtest
from treeq_export.client.connection import Connection, ServerAddress, parse_url
from treeq_export.client.load_setup import LoadOptions
from treeq_export.client.loadtest import find_doubts, read_loadtest, run_loadtest
from treeq_export.errors import ServeError
from treeq_export.records.loadtest import LoadTestRecord

URL = "http://user:secret@host:8000"
SAMPLER: dict[str, Any] = {
    "name": "sampler",
    "backend": "python",
    "max_batch_size": 4,
    "dynamic_batching": {"max_queue_delay_microseconds": 100},
    "instance_group": [{"count": 1}],
    "input": [{"name": name, "dims": [1]} for name in ("label", "seed", "steps", "guidance")],
    "output": [
        {"name": "image", "dims": [2, 2, 1]},
        {"name": "latents", "dims": [1, 2, 2]},
        {"name": "step", "dims": [1]},
    ],
    "parameters": {
        f"treeq_{key}": {"string_value": value}
        for key, value in {
            "mode": "bls",
            "model": "digits",
            "target": "ort",
            "steps": "25",
            "guidance": "1.0",
            "num_classes": "10",
        }.items()
    },
}
DENOISER: dict[str, Any] = {
    "name": "denoiser",
    "platform": "onnxruntime_onnx",
    "max_batch_size": 16,
    "instance_group": [{"count": 2}],
}


class Server:
    """Configurations and counters; every image is done in one execution, 25 of the denoiser."""

    def __init__(self) -> None:
        self.configs = {"sampler": SAMPLER, "denoiser": DENOISER}
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.dies_after = 10**9
        self.refuses: Callable[[int], bool] = lambda _number: False
        self.others = 0

    def count(self, model: str) -> int:
        return (len(self.requests) + self.others) * (25 if model == "denoiser" else 1)

    def check(self, connection: Connection) -> None:
        if len(self.requests) >= self.dies_after:
            raise connection.unreachable("Connection refused")


class FakeConnection(Connection):
    """A connection to a `Server`."""

    def __init__(self, address: ServerAddress, timeout_s: float, server: Server) -> None:
        super().__init__(address, timeout_s)
        self.server = server

    def close(self) -> None:
        pass

    def is_server_live(self) -> bool:
        return True

    def is_server_ready(self) -> bool:
        return True

    def is_model_ready(self, model: str) -> bool:
        return model in self.server.configs

    def models(self) -> list[dict[str, Any]]:
        return [{"name": name, "version": "3", "state": "READY"} for name in self.server.configs]

    def model_config(self, model: str) -> dict[str, Any]:
        self.server.check(self)
        if model not in self.server.configs:
            raise self.error("refused", f"Request for unknown model: '{model}' is not found")
        return self.server.configs[model]

    def statistics(self, model: str) -> dict[str, Any]:
        self.server.check(self)
        count = self.server.count(model)
        durations = {"success": 0.004, "queue": 0.001, "compute_infer": 0.002}
        return {
            "model_stats": [
                {
                    "version": "3",
                    "inference_count": count,
                    "execution_count": count,
                    "inference_stats": {
                        name: {"count": count, "ns": int(ms * 1e6) * count}
                        for name, ms in durations.items()
                    },
                }
            ]
        }

    def load(self, model: str) -> None:
        raise NotImplementedError

    def unload(self, model: str) -> None:
        raise NotImplementedError

    def infer(self, model: str, inputs: Any, outputs: Any) -> dict[str, Any]:
        with self.server.lock:
            self.server.check(self)
            number = int(inputs["seed"][0, 0])
            if self.server.refuses(number):
                raise self.error("refused", "sampler: no.")
            self.server.requests.append(dict(inputs))
        arrays = {"image": np.zeros((1, 2, 2, 1), np.uint8), "step": np.array([[25]], np.int32)}
        return {name: arrays[name] for name in outputs}

    def stream(self, model: str, inputs: Any, outputs: Any) -> Iterator[dict[str, Any]]:
        yield self.infer(model, inputs, outputs)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """What every connection leads to."""
    server = Server()

    def connect(url: str, timeout_s: float) -> Connection:
        return FakeConnection(parse_url(url), timeout_s, server)

    monkeypatch.setattr(loadtest, "open_connection", connect)
    monkeypatch.setattr(load_setup, "open_connection", connect)
    monkeypatch.setattr(load_clients, "_PAUSE_S", 0.0)
    monkeypatch.setattr(loadtest, "_SETTLE_S", 0.0)
    monkeypatch.setattr(loadtest, "_IDLE_LOOK_S", 0.01)
    return server


def ignore(_name: str, _kept: bool) -> Callable[[float], None]:
    return lambda _fraction: None


def load(folder: Path, *concurrency: int, **changes: Any) -> LoadTestRecord:
    fresh = changes.pop("fresh", False)
    short: dict[str, Any] = {"duration_s": 0.05, "warmup_s": 0.0}
    options = LoadOptions(URL, concurrency=concurrency, **{**short, **changes})
    return run_loadtest(options, folder, ignore, fresh=fresh)


def call(*args: object) -> Result:
    return CliRunner().invoke(
        main, ["loadtest", *(str(arg) for arg in args)], env={"COLUMNS": "200"}
    )


def one_line(result: Result) -> str:
    lines = [line for line in result.stderr.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1, result.stderr
    return lines[0]


class TestRecord:
    def test_setup_is_what_the_server_says(self, server: Server, tmp_path: Path) -> None:
        setup = load(tmp_path, 1, note="emulated").setup
        assert setup.url == "http://host:8000"
        assert "secret" not in (tmp_path / "loadtest.json").read_text()
        assert (setup.protocol, setup.model, setup.mode, setup.target) == (
            "http",
            "digits",
            "bls",
            "ort",
        )
        assert (setup.steps, setup.guidance, setup.output) == (25, 1.0, "image")
        assert setup.note == "emulated"
        sampler, denoiser = setup.models
        assert (sampler.version, sampler.dynamic_batching, sampler.queue_delay_us) == (
            "3",
            True,
            100,
        )
        assert (denoiser.backend, denoiser.dynamic_batching, denoiser.queue_delay_us) == (
            "onnxruntime_onnx",
            False,
            0,
        )
        assert (denoiser.max_batch, denoiser.num_instances) == (16, 2)

    def test_counts_are_those_of_the_level_alone(self, server: Server, tmp_path: Path) -> None:
        record = load(tmp_path, 1, 2, warmup_s=0.02)
        for level in record.levels:
            sampler, denoiser = level.models
            assert sampler.num_requests == level.num_requests == len(level.latencies_ms)
            assert denoiser.num_requests == 25 * level.num_requests
            assert (sampler.average_batch, sampler.queue_ms, sampler.compute_ms) == (
                1.0,
                0.001,
                0.002,
            )
            assert level.p50_ms is not None
            assert level.client.outside_ms is None  # mode bls

    def test_requests_are_deterministic_and_differ(self, server: Server, tmp_path: Path) -> None:
        record = load(tmp_path, 2, seed=7, warmup_s=0.02, steps=3, guidance=2.0)
        num = record.levels[0].num_requests
        seeds = [int(request["seed"][0, 0]) for request in server.requests]
        assert len(set(seeds)) == len(seeds)
        counted = [request for request in server.requests if request["seed"][0, 0] < 2**39]
        assert len(counted) == num
        for parity in (0, 1):  # a client's numbers have a stride of 2
            numbers = [seed - 7 for seed in seeds[-num:] if (seed - 7) % 2 == parity]
            assert numbers == list(range(parity, parity + 2 * len(numbers), 2))
        for request in counted:
            assert request["label"][0, 0] == (request["seed"][0, 0] - 7) % 10
            assert (request["steps"][0, 0], request["guidance"][0, 0]) == (3, 2.0)

    def test_decoupled_sampler_streams(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decoupled = {"model_transaction_policy": {"decoupled": True}}
        monkeypatch.setitem(server.configs, "sampler", SAMPLER | decoupled)
        monkeypatch.delattr(FakeConnection, "infer")
        monkeypatch.setattr(FakeConnection, "__abstractmethods__", frozenset())
        step = {"image": np.zeros((1, 2, 2, 1)), "step": np.array([[25]])}
        monkeypatch.setattr(FakeConnection, "stream", lambda *_: iter([step]))
        assert load(tmp_path, 1).levels[0].num_errors == 0

    def test_server_without_a_denoiser(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delitem(server.configs, "denoiser")
        assert [model.name for model in load(tmp_path, 1).setup.models] == ["sampler"]

    def test_memory_of_a_process(self, server: Server, tmp_path: Path) -> None:
        level = load(tmp_path, 1, server_pid=psutil.Process().pid).levels[0]
        assert level.memory is not None
        assert level.memory.bytes[0] > 1e6

    def test_doubts(self, server: Server, tmp_path: Path) -> None:
        record = load(tmp_path, 1)
        calm = record.environment | {"busy_cores": 0.1}
        level = record.levels[0]
        idle = level.client.model_copy(update={"cpu_share": 0.1})
        quiet = record.model_copy(
            update={"environment": calm, "levels": [level.model_copy(update={"client": idle})]}
        )
        assert find_doubts(quiet) == []
        busy = level.client.model_copy(update={"cpu_share": 0.9})
        more = level.models[0].model_copy(update={"num_requests": level.num_requests + 5})
        changes = {"client": busy, "models": [more, level.models[1]]}
        noisy = record.model_copy(
            update={
                "environment": calm | {"busy_cores": 1.5, "cores": 2},
                "levels": [level.model_copy(update=changes)],
            }
        )
        programs, client, others = find_doubts(noisy)
        assert "kept 1.5 of 2 cores busy" in programs
        assert "0.90 of a core" in client
        assert "5 requests more" in others


class TestGoingOn:
    def test_finished_levels_are_kept(self, server: Server, tmp_path: Path) -> None:
        first = load(tmp_path, 4, 1)
        assert [level.concurrency for level in first.levels] == [1, 4]
        started: list[tuple[str, bool]] = []

        def start(name: str, kept: bool) -> Callable[[float], None]:
            started.append((name, kept))
            return lambda _fraction: None

        options = LoadOptions(URL, concurrency=(1, 2, 4), duration_s=0.05, warmup_s=0.0)
        second = run_loadtest(options, tmp_path, start)
        assert started == [("1 client", True), ("2 clients", False), ("4 clients", True)]
        assert [level.concurrency for level in second.levels] == [1, 2, 4]
        assert [second.levels[0], second.levels[2]] == first.levels
        assert read_loadtest(tmp_path / "loadtest.json") == second

    def test_interruption_loses_one_level(self, server: Server, tmp_path: Path) -> None:
        def start(name: str, _kept: bool) -> Callable[[float], None]:
            def on_fraction(_fraction: float) -> None:
                if name == "2 clients":
                    raise KeyboardInterrupt

            return on_fraction

        options = LoadOptions(URL, concurrency=(1, 2, 4), duration_s=0.05, warmup_s=0.0)
        with pytest.raises(KeyboardInterrupt):
            run_loadtest(options, tmp_path, start)
        record = read_loadtest(tmp_path / "loadtest.json")
        assert [level.concurrency for level in record.levels] == [1]
        assert [path.name for path in tmp_path.iterdir()] == ["loadtest.json"]

    def test_levels_with_errors_are_measured_again(self, server: Server, tmp_path: Path) -> None:
        server.refuses = lambda number: number == 0
        assert load(tmp_path, 1).levels[0].errors == {"http://host:8000: sampler: no.": 1}
        server.refuses = lambda _number: False
        assert load(tmp_path, 1).levels[0].num_errors == 0

    def test_levels_without_memory_are_measured_again(self, server: Server, tmp_path: Path) -> None:
        assert load(tmp_path, 1).levels[0].memory is None
        again = load(tmp_path, 1, server_pid=psutil.Process().pid)
        assert again.levels[0].memory is not None
        assert load(tmp_path, 1) == again

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"duration_s": 0.06}, "duration_s 0.05, now 0.06"),
            ({"steps": 5}, "steps 25, now 5"),
            ({"note": "other"}, "note , now other"),
        ],
    )
    def test_another_setup_is_refused(
        self, server: Server, tmp_path: Path, changes: dict[str, Any], named: str
    ) -> None:
        load(tmp_path, 1)
        before = (tmp_path / "loadtest.json").read_bytes()
        with pytest.raises(ServeError, match="of another setup") as caught:
            load(tmp_path, 1, **changes)
        assert f"{named}. Choose another --out, or pass --fresh" in str(caught.value)
        assert (tmp_path / "loadtest.json").read_bytes() == before
        assert len(load(tmp_path, 1, fresh=True, **changes).levels) == 1

    def test_another_configuration_is_refused(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        load(tmp_path, 1)
        monkeypatch.setitem(server.configs, "denoiser", DENOISER | {"max_batch_size": 2})
        with pytest.raises(ServeError, match="of another setup: models, config_sha256"):
            load(tmp_path, 1)

    def test_malformed_record_is_refused(self, server: Server, tmp_path: Path) -> None:
        (tmp_path / "loadtest.json").write_text('{"levels": [')
        with pytest.raises(ServeError, match=r" Pass --fresh to replace it"):
            load(tmp_path, 1)
        assert len(load(tmp_path, 1, fresh=True).levels) == 1


class TestCommand:
    QUICK = ("--url", URL, "--duration", 0.05, "--warmup", 0)

    def test_table_record_and_picture(self, server: Server, tmp_path: Path) -> None:
        result = call(*self.QUICK, "--concurrency", "1,2", "--out", tmp_path / "a")
        assert result.exit_code == 0, result.stderr
        assert "digits, ort, 25 steps: bls, dynamic batching of the sampler (100 us), http" in (
            " ".join(result.stdout.split())
        )
        assert "per s" in result.stdout
        assert "growth" not in result.stdout
        assert "1 client   ..." in result.stderr
        assert {path.name for path in (tmp_path / "a").iterdir()} == {
            "loadtest.json",
            "loadtest.png",
        }

    def test_memory_in_the_table(self, server: Server, tmp_path: Path) -> None:
        pid = psutil.Process().pid
        result = call(*self.QUICK, "--concurrency", 1, "--out", tmp_path, "--server-pid", pid)
        assert result.exit_code == 0, result.stderr
        assert "growth" in result.stdout

    def test_json(self, server: Server, tmp_path: Path) -> None:
        result = call(*self.QUICK, "--concurrency", "1", "--out", tmp_path, "--json")
        assert json.loads(result.stdout) == json.loads((tmp_path / "loadtest.json").read_text())

    def test_plot_of_two(self, server: Server, tmp_path: Path) -> None:
        for name in ("a", "b"):
            assert call(*self.QUICK, "--concurrency", 1, "--out", tmp_path / name).exit_code == 0
        files = ",".join(str(tmp_path / name / "loadtest.json") for name in ("a", "b"))
        result = call("--plot", files, "--out", tmp_path / "both")
        assert result.exit_code == 0, result.stderr
        assert [path.name for path in (tmp_path / "both").iterdir()] == ["loadtest.png"]

    def test_failed_requests(self, server: Server, tmp_path: Path) -> None:
        server.refuses = lambda number: number == 0
        result = call(*self.QUICK, "--concurrency", "1", "--out", tmp_path)
        assert result.exit_code == 1
        assert "per s" in result.stdout
        assert "requests failed, first at concurrency 1: http://host:8000: sampler: no. (1x)" in (
            result.stderr
        )
        assert (tmp_path / "loadtest.png").is_file()

    def test_server_that_dies(self, server: Server, tmp_path: Path) -> None:
        server.dies_after = 5
        result = call(
            "--url", URL, "--duration", 60, "--warmup", 0, "--concurrency", "2,4", "--out", tmp_path
        )
        assert result.exit_code == 1
        level = read_loadtest(tmp_path / "loadtest.json").levels[0]
        assert (level.concurrency, level.complete) == (2, False)
        assert (level.num_requests, level.num_errors) == (4, 20)  # one was the first request of all
        assert level.models == []
        assert (
            "20 of 24 requests failed, first at concurrency 2: http://host:8000: not reached"
            in (result.stderr)
        )
        assert "4 clients" not in result.stderr

    def test_server_that_dies_in_the_warm_up(self, server: Server, tmp_path: Path) -> None:
        server.dies_after = 5
        result = call("--url", URL, "--warmup", 60, "--concurrency", "1", "--out", tmp_path)
        assert result.exit_code == 1
        assert "gave up in the warm-up of concurrency 1: http://host:8000: not reached" in (
            one_line(result)
        )

    def test_unknown_model(self, server: Server, tmp_path: Path) -> None:
        result = call("--url", URL, "--model", "simpler", "--out", tmp_path)
        assert result.exit_code == 1
        assert "unknown model: 'simpler'" in one_line(result)
        assert list(tmp_path.iterdir()) == []

    def test_model_that_is_no_sampler(self, server: Server, tmp_path: Path) -> None:
        server.configs["denoiser"] = DENOISER | {"input": [], "output": []}
        result = call("--url", URL, "--model", "denoiser", "--out", tmp_path)
        assert result.exit_code == 1
        assert "denoiser: no sampler of treeq-export" in one_line(result)

    def test_refused_first_request(self, server: Server, tmp_path: Path) -> None:
        server.refuses = lambda _number: True
        result = call("--url", URL, "--out", tmp_path)
        assert (result.exit_code, list(tmp_path.iterdir())) == (1, [])
        assert one_line(result) == "treeq-export: http://host:8000: sampler: no."

    def test_steps_out_of_range(self, server: Server, tmp_path: Path) -> None:
        result = call("--url", URL, "--steps", 0, "--out", tmp_path)
        assert result.exit_code == 1
        assert "steps: received 0, expected 1 or more" in one_line(result)

    @pytest.mark.parametrize("scheme", ["http", "grpc"])
    def test_unreachable_server(self, scheme: str, tmp_path: Path) -> None:
        result = call("--url", f"{scheme}://127.0.0.1:9", "--out", tmp_path)
        assert result.exit_code == 1
        assert f"{scheme}://127.0.0.1:9: not reached" in one_line(result)

    @pytest.mark.parametrize(
        ("arguments", "status", "message"),
        [
            ([], 2, "Give --url to load a server, or --plot to draw records."),
            (["--url", "x", "--plot", "a.json"], 2, "Give --url to load a server, or --plot"),
            (["--url", "x", "--concurrency", "1,many"], 2, "'1,many': expected numbers"),
            (["--url", "x", "--concurrency", "0,1"], 1, "concurrency: received 0,1, expected"),
            (["--url", "x", "--concurrency", "5000"], 1, "numbers of clients in 1..1024"),
            (["--url", "x", "--duration", "0"], 1, "duration: received 0.0, expected more than 0"),
            (["--url", "x", "--duration", "inf"], 1, "duration: received inf"),
            (["--url", "x", "--warmup", "-1"], 1, "warmup: received -1.0, expected 0 seconds or"),
            (["--url", "x", "--seed", "-1"], 1, "seed: received -1, expected 0.."),
            (["--url", "ftp://x"], 1, "url: received 'ftp://x', expected http://host:port"),
            (["--url", "x", "--server-pid", "99999999"], 1, "server-pid: received 99999999"),
            (["--plot", "no/such.json"], 1, "no/such.json: missing, expected a record of"),
        ],
    )
    def test_bad_options(
        self, arguments: list[str], status: int, message: str, tmp_path: Path
    ) -> None:
        result = call(*arguments, "--out", tmp_path)
        assert result.exit_code == status
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert list(tmp_path.iterdir()) == []

    def test_plot_of_something_else(self, tmp_path: Path) -> None:
        path = tmp_path / "bench.json"
        path.write_text("{}")
        result = call("--plot", path, "--out", tmp_path)
        assert result.exit_code == 1
        assert "malformed, expected a record of `treeq-export loadtest`" in one_line(result)
