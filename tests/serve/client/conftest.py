"""A real server with stand-ins of all kinds of samplers, for the tests of the client side."""

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from treeq_export.client.connection import Connection
from treeq_export.client.open import open_connection
from treeq_export.client.web import SideCar, serve_web

collect_ignore = ["fake_model.py"]  # it imports what only Triton has

SLOW_SEED = 1001  # takes 0.8 s
RAISING_SEED = 1002  # an exception that the model does not catch

_LABEL = ("label", "TYPE_INT32", [1], False)
_TEXT = (
    ("encoder_hidden_states", "TYPE_FP32", [3, 4], False),
    ("pooled_projections", "TYPE_FP32", [5], False),
)
_CONTROLS = (
    ("seed", "TYPE_INT64", [1], False),
    ("steps", "TYPE_INT32", [1], True),
    ("guidance", "TYPE_FP32", [1], True),
    ("preview_every", "TYPE_INT32", [1], True),
)
_LATENTS = ("latents", "TYPE_FP32", [1, 8, 8])
_IMAGE = ("image", "TYPE_UINT8", [8, 8, 1])
_STEP = ("step", "TYPE_INT32", [1])
_DENOISER_INPUTS = (
    ("sample", "TYPE_FP32", [1, 8, 8], False),
    ("timestep", "TYPE_FP32", [1], False),
    ("class_labels", "TYPE_INT64", [1], False),
)


def _config(
    inputs: Any, outputs: Any, *, num_classes: int | None = None, decoupled: bool = False
) -> str:
    given = {
        "treeq_mode": "inprocess",
        "treeq_model": "digits",
        "treeq_steps": "20",
        "treeq_guidance": "1.5",
        "treeq_target": "ort",
        "slow_seed": str(SLOW_SEED),
        "raising_seed": str(RAISING_SEED),
    }
    given |= {} if num_classes is None else {"treeq_num_classes": str(num_classes)}
    lines = ['backend: "python"', "max_batch_size: 4"]
    for name, kind, dims, optional in inputs:
        what = f'name: "{name}" data_type: {kind} dims: {dims}'
        lines.append(f"input [ {{ {what} optional: {str(optional).lower()} }} ]")
    lines += [f'output [ {{ name: "{n}" data_type: {t} dims: {d} }} ]' for n, t, d in outputs]
    lines.append("instance_group [ { kind: KIND_CPU count: 1 } ]")
    if decoupled:
        lines.append("model_transaction_policy { decoupled: true }")
    if inputs is not _DENOISER_INPUTS:
        lines += [
            f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
            for key, value in given.items()
        ]
    return "\n".join(lines) + "\n"


_CLASS_OUTPUTS = (_LATENTS, _IMAGE, _STEP)
CONFIGS = {
    "sampler": _config((_LABEL, *_CONTROLS), _CLASS_OUTPUTS, num_classes=10),
    "stream": _config((_LABEL, *_CONTROLS), _CLASS_OUTPUTS, num_classes=10, decoupled=True),
    "large": _config((_LABEL, *_CONTROLS), _CLASS_OUTPUTS, num_classes=1000),
    "text": _config((*_TEXT, *_CONTROLS), (_LATENTS, _STEP)),
    "denoiser": _config(_DENOISER_INPUTS, (("prediction", "TYPE_FP32", [1, 8, 8]),)),
}


@dataclass(frozen=True)
class Fake:
    """The server, and what the tests do to it.

    Attributes:
        http: http://host:port.
        grpc: grpc://host:port.
        repository: Its model repository.
        pid: Of the server.
    """

    http: str
    grpc: str
    repository: Path
    pid: int

    def kill(self, model: str) -> None:
        """Kill the process of a model; the server stays."""
        folder = f"{self.repository / model}/"
        for process in psutil.Process(self.pid).children(recursive=True):
            if process.status() != psutil.STATUS_ZOMBIE and any(
                part.startswith(folder) for part in process.cmdline()
            ):
                process.kill()
                while process.status() != psutil.STATUS_ZOMBIE:  # which the server leaves it
                    time.sleep(0.01)

    def flag(self, model: str, name: str) -> Path:
        """Return the file that makes a model misbehave: "nan", or "broken" at its next load."""
        return self.repository / model / "1" / name


@pytest.fixture(scope="session")
def fake(
    local_triton: ModuleType, server_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fake]:
    """A real server with the models of CONFIGS."""
    repository = tmp_path_factory.mktemp("fake") / "repository"
    for name, config in CONFIGS.items():
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "config.pbtxt").write_text(config)
        shutil.copy2(Path(__file__).with_name("fake_model.py"), repository / name / "1/model.py")
    # A model whose process was killed never ends to unload, which is what the server waits for.
    quick_end = ["--exit-timeout-secs=1"]
    with local_triton.serve(repository, server_python, arguments=quick_end) as server:
        yield Fake(f"http://{server.http}", f"grpc://{server.grpc}", repository, server.process.pid)


@pytest.fixture
def connect(fake: Fake) -> Iterator[Callable[..., Connection]]:
    """A function: "http" or "grpc" -> a connection to the server."""
    opened: list[Connection] = []

    def connect(protocol: str, timeout_s: float = 10.0) -> Connection:
        opened.append(open_connection(getattr(fake, protocol), timeout_s))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


class RunningPage:
    """A side-car in a thread of its own.

    Args:
        side_car: What it serves.
    """

    def __init__(self, side_car: SideCar) -> None:
        self.url = ""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(side_car),))
        self._thread.start()
        assert self._ready.wait(10)

    async def _run(self, side_car: SideCar) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()

        def ready(url: str) -> None:
            self.url = url
            self._ready.set()

        await serve_web(side_car, "127.0.0.1", 0, ready, self._stop)

    def close(self) -> None:
        """Stop it; twice is fine."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()


@pytest.fixture
def open_page(fake: Fake) -> Iterator[Callable[..., RunningPage]]:
    """A function: protocol or URL, model and options of SideCar -> its page, served."""
    pages: list[RunningPage] = []

    def open_page(server: str = "http", model: str = "sampler", **options: Any) -> RunningPage:
        url = getattr(fake, server, server)
        pages.append(RunningPage(SideCar(url, model, timeout_s=5.0, **options)))
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()
