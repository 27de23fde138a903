"""The load test against the real server, with a sampler that only sleeps."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from treeq_export.cli import main
from treeq_export.client.load_setup import LoadOptions
from treeq_export.client.loadtest import read_loadtest, run_loadtest
from treeq_export.records.loadtest import describe_errors

SLEEP_MS = 5
CONFIG = """
name: "sampler"
backend: "python"
max_batch_size: 16
input [
  { name: "label" data_type: TYPE_INT32 dims: [1] },
  { name: "seed" data_type: TYPE_INT64 dims: [1] },
  { name: "steps" data_type: TYPE_INT32 dims: [1] optional: true },
  { name: "guidance" data_type: TYPE_FP32 dims: [1] optional: true }
]
output [
  { name: "latents" data_type: TYPE_FP32 dims: [1, 8, 8] },
  { name: "image" data_type: TYPE_UINT8 dims: [8, 8, 1] },
  { name: "step" data_type: TYPE_INT32 dims: [1] }
]
instance_group [ { kind: KIND_CPU count: 1 } ]
dynamic_batching { max_queue_delay_microseconds: 100 }
"""
MODEL = f"""
import time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        time.sleep({SLEEP_MS} / 1e3)
        return [self.answer(request) for request in requests]

    def answer(self, request):
        seed = pb_utils.get_input_tensor_by_name(request, "seed").as_numpy()
        arrays = {{
            "image": np.zeros((len(seed), 8, 8, 1), np.uint8),
            "latents": np.zeros((len(seed), 1, 8, 8), np.float32),
            "step": np.full((len(seed), 1), 4, np.int32),
        }}
        names = request.requested_output_names()
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, arrays[name]) for name in names])
"""
PARAMETERS = {
    "mode": "inprocess",
    "model": "asleep",
    "target": "none",
    "steps": "4",
    "guidance": "1.0",
    "num_classes": "10",
}


@pytest.fixture
def server(tmp_path: Path, server_python: Path, local_triton: ModuleType) -> Iterator[Any]:
    """The real server with a sampler that sleeps."""
    folder = tmp_path / "repository" / "sampler"
    (folder / "1").mkdir(parents=True)
    parameters = [
        f'parameters {{ key: "treeq_{key}" value {{ string_value: "{value}" }} }}\n'
        for key, value in PARAMETERS.items()
    ]
    (folder / "config.pbtxt").write_text(CONFIG + "".join(parameters))
    (folder / "1" / "model.py").write_text(MODEL)
    with local_triton.serve(folder.parent, server_python) as running:
        yield running


@pytest.mark.triton
@pytest.mark.slow
def test_both_protocols_then_a_server_that_dies(server: Any, tmp_path: Path) -> None:
    for protocol in ("http", "grpc"):
        result = CliRunner().invoke(
            main,
            [
                "loadtest",
                *("--url", f"{protocol}://{getattr(server, protocol)}"),
                *("--concurrency", "1,8", "--duration", "1", "--warmup", "0.2"),
                *("--server-pid", str(server.process.pid), "--out", str(tmp_path / protocol)),
            ],
        )
        assert result.exit_code == 0, result.stderr
        record = read_loadtest(tmp_path / protocol / "loadtest.json")
        assert (record.setup.protocol, record.setup.models[0].version) == (protocol, "1")
        one, eight = record.levels
        for level in record.levels:
            (sampler,) = level.models
            # The server counted exactly the requests of the level, none of the warm-up.
            assert sampler.num_requests == sampler.num_inferences == level.num_requests > 0
            assert min(level.latencies_ms) >= SLEEP_MS
            assert level.client.outside_ms is not None
            assert level.client.outside_ms > 0.0
            assert sampler.compute_ms is not None
            assert sampler.compute_ms >= SLEEP_MS
            assert level.memory is not None
            assert min(level.memory.num_processes) >= 2  # the server, and the model's own process
        assert one.models[0].average_batch == 1.0
        assert eight.models[0].num_executions < eight.models[0].num_inferences  # merged
        assert 1.0 < (eight.models[0].average_batch or 0.0) <= 8.0

    def start(name: str, _kept: bool) -> Callable[[float], None]:
        def on_fraction(_fraction: float) -> None:
            if name == "2 clients" and not killed.is_set():
                killed.set()
                server.process.kill()

        return on_fraction

    killed = threading.Event()
    options = LoadOptions(
        f"http://{server.http}", concurrency=(2, 4), duration_s=60.0, warmup_s=0.0
    )
    record = run_loadtest(options, tmp_path / "dies", start)
    (level,) = record.levels
    assert (level.concurrency, level.complete) == (2, False)
    assert level.num_requests > 0
    assert level.num_errors >= 20
    assert "not reached" in (describe_errors(record.levels) or "")
    assert read_loadtest(tmp_path / "dies" / "loadtest.json") == record
