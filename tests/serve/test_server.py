"""Generated repositories on a real Triton server: that of the wheel nvidia-pytriton.

The backends of ONNX Runtime and TensorRT are EMULATED where a test says so: the wheel has neither.
"""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

from treeq_export.cli import main
from treeq_export.client.connection import Connection
from treeq_export.client.health import check, heal
from treeq_export.client.open import open_connection
from treeq_export.errors import ServeError
from treeq_export.model.sampler import sample
from treeq_export.runners.ort_runner import OrtRunner
from treeq_export.serve.options import ServeOptions
from treeq_export.serve.stage import run_serve
from treeq_served.denoise import pixels_from_samples

pytestmark = [pytest.mark.triton, pytest.mark.slow]

CASES = [(7, 1), (0, 2**40), (3, 5)]
PROTOCOLS = ["http", "grpc"]
Open = Callable[[str], AbstractContextManager[Connection]]
Expect = Callable[..., NDArray[np.float32]]


def write(run: Path, out: Path, *options: str) -> Path:
    arguments = ["serve", "--run", str(run), "--out", str(out), "--threads", "1", *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return out


class Started:
    """A running server and how to reach it."""

    def __init__(self, server: Any, repository: Path) -> None:
        self.server = server
        self.repository = repository

    def connect(self, protocol: str = "http") -> Connection:
        address = self.server.http if protocol == "http" else self.server.grpc
        return open_connection(f"{protocol}://{address}", timeout_s=60)

    def processes(self, model: str) -> list[psutil.Process]:
        """Return the processes of a model."""
        children = psutil.Process(self.server.process.pid).children(recursive=True)
        return [
            child
            for child in children
            if child.is_running() and any(f"/{model}/" in part for part in child.cmdline())
        ]


@pytest.fixture(scope="module")
def start(
    local_triton: ModuleType,
    server_python: Path,
    served_run: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., AbstractContextManager[Started]]:
    """A function: options of `serve`, keywords of the local server -> a started server."""

    @contextmanager
    def start_server(*options: str, run: Path = served_run, **keywords: Any) -> Iterator[Started]:
        repository = write(run, tmp_path_factory.mktemp("served") / "triton", *options)
        with local_triton.serve(repository, server_python, **keywords) as server:
            yield Started(server, repository)

    return start_server


@pytest.fixture(scope="module")
def inprocess(start: Callable[..., AbstractContextManager[Started]]) -> Iterator[Started]:
    """Mode inprocess; tests leave it as they found it."""
    with start("--backend", "python") as started:
        yield started


def ask(connection: Connection, *rows: tuple[int, int], **extra: Any) -> dict[str, NDArray[Any]]:
    labels, seeds = zip(*rows, strict=True)
    inputs = {
        "label": np.array(labels, np.int32)[:, None],
        "seed": np.array(seeds, np.int64)[:, None],
    } | extra
    return connection.infer("sampler", inputs, ["latents", "image", "step"])


def check_equal(started: Started, expect: Expect, target: str = "ort") -> None:
    """Both protocols, one image and several, alone and at the same time."""
    for protocol in PROTOCOLS:
        with started.connect(protocol) as connection:
            for label, seed in CASES:
                expected = expect(label, seed, target)
                arrays = ask(connection, (label, seed))
                assert np.array_equal(arrays["latents"], expected)
                assert np.array_equal(arrays["image"], pixels_from_samples(expected))
                assert arrays["step"].tolist() == [[2]]


def check_equal_together(started: Started, expect: Expect) -> None:
    """Requests that the server may merge."""

    def one(index: int) -> NDArray[Any]:
        with started.connect(PROTOCOLS[index % 2]) as connection:
            return ask(connection, (index % 10, index))["latents"]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(one, range(32)))
    for index, latents in enumerate(results):
        assert np.array_equal(latents, expect(index % 10, index)), index


def average_batch(connection: Connection, model: str) -> float:
    (entry,) = connection.statistics(model)["model_stats"]
    return entry["inference_count"] / entry["execution_count"]


class TestEqualToTheInProcessRunner:
    def test_inprocess(self, inprocess: Started, expect: Expect) -> None:
        check_equal(inprocess, expect)
        check_equal_together(inprocess, expect)
        with inprocess.connect() as connection:
            assert average_batch(connection, "sampler") > 1
            rows = ask(connection, *CASES)
            for row, (label, seed) in enumerate(CASES):
                assert np.array_equal(rows["latents"][row : row + 1], expect(label, seed))

    def test_steps_and_guidance_of_a_request(self, inprocess: Started, expect: Expect) -> None:
        with inprocess.connect("grpc") as connection:
            arrays = ask(
                connection,
                (4, 9),
                steps=np.array([[5]], np.int32),
                guidance=np.array([[2.5]], np.float32),
            )
        assert np.array_equal(arrays["latents"], expect(4, 9, steps=5, guidance_scale=2.5))
        assert arrays["step"].tolist() == [[5]]

    @pytest.mark.parametrize("backend", ["python", "onnxruntime (EMULATED)"])
    def test_bls(
        self,
        start: Callable[..., AbstractContextManager[Started]],
        expect: Expect,
        backend: str,
    ) -> None:
        name = backend.split()[0]
        with start("--backend", name, "--mode", "bls", emulate="EMULATED" in backend) as started:
            check_equal(started, expect)
            check_equal_together(started, expect)
            with started.connect() as connection:
                assert average_batch(connection, "denoiser") > 1
            assert ("EMULATED" in started.server.log.read_text()) == ("EMULATED" in backend)

    def test_tensorrt_with_an_emulated_backend(
        self,
        start: Callable[..., AbstractContextManager[Started]],
        engine_run: Path,
        plugin_library: Path,
        expect: Expect,
    ) -> None:
        graph = engine_run / "onnx" / "tensorrt" / "model.onnx"
        options = ("--target", "tensorrt", "--plugin-library", str(plugin_library))
        environment = {"TREEQ_EMULATED_GRAPH": str(graph)}
        keywords = {"run": engine_run, "emulate": True, "environment": environment}
        with (
            pytest.raises(RuntimeError, match="KIND_GPU"),
            start(*options, "--mode", "bls", **keywords),
        ):
            pass
        environment["TRITON_CONFIG"] = "cpu"
        with start(*options, "--mode", "bls", **keywords) as started:
            check_equal(started, expect, "tensorrt")
            log = started.server.log.read_text()
        assert "the TensorRT backend is EMULATED" in log
        assert "version not found, not checked (expected 10.13.3.9)" in log


def test_models_are_loaded_and_unloaded(inprocess: Started):
    with inprocess.connect() as connection:
        assert connection.is_model_ready("sampler")
        assert not connection.is_model_ready("denoiser")
        connection.load("denoiser")
        assert connection.is_model_ready("denoiser")
        zeros = {
            "sample": np.zeros((1, 1, 8, 8), np.float32),
            "timestep": np.zeros((1, 1), np.float32),
            "class_labels": np.zeros((1, 1), np.int64),
        }
        assert np.isfinite(connection.infer("denoiser", zeros, ["prediction"])["prediction"]).all()
        zeros["sample"][0, 0, 3, 3] = np.nan
        with pytest.raises(ServeError, match="denoiser: sample: holds NaN or infinity") as caught:
            connection.infer("denoiser", zeros, ["prediction"])
        assert caught.value.kind == "refused"
        connection.unload("denoiser")
        with pytest.raises(ServeError, match="denoiser"):
            connection.infer("denoiser", zeros, ["prediction"])
        assert check(connection).healthy


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"label": np.array([[12]], np.int32)}, "refused", "label: received 12, expected 0..9."),
        ({"label": np.zeros((1, 2), np.int32)}, "refused", "label"),
        ({"label": np.zeros((1, 1), np.float32)}, "refused", "label"),
        ({"guidance": np.array([[np.nan]], np.float32)}, "refused", "guidance: received nan"),
        ({"steps": np.array([[0]], np.int32)}, "refused", "steps: received 0"),
        ({"seed": np.array([[-1]], np.int64)}, "refused", "seed: received -1"),
        (
            {"label": np.zeros((9, 1), np.int32), "seed": np.zeros((9, 1), np.int64)},
            "refused",
            "batch",
        ),
        ({"unknown": np.zeros((1, 1), np.int32)}, "refused", "unknown"),
        ({"preview_every": np.array([[1]], np.int32)}, "refused", "need a decoupled model"),
    ],
)
def test_a_bad_request_is_refused_and_the_server_lives(
    inprocess: Started,
    expect: Expect,
    protocol: str,
    change: dict[str, NDArray[Any]],
    kind: str,
    words: str,
):
    inputs = {"label": np.zeros((1, 1), np.int32), "seed": np.zeros((1, 1), np.int64)}
    with inprocess.connect(protocol) as connection:
        with pytest.raises(ServeError) as caught:
            connection.infer("sampler", inputs | change, ["latents"])
        assert caught.value.kind == kind
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
        arrays = connection.infer("sampler", inputs, ["latents"])
    assert np.array_equal(arrays["latents"], expect(0, 0))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_unknown_model_is_named(inprocess: Started, protocol: str):
    with inprocess.connect(protocol) as connection:
        with pytest.raises(ServeError, match="painter"):
            connection.infer("painter", {"x": np.zeros((1, 1), np.int32)}, ["y"])
        with pytest.raises(ServeError, match="painter"):
            connection.load("painter")
        assert connection.is_server_live()


def test_previews_are_streamed(
    start: Callable[..., AbstractContextManager[Started]], expect: Expect
):
    with start("--backend", "python", "--decoupled") as started:
        with started.connect("grpc") as connection:
            inputs = {
                "label": np.array([[7]], np.int32),
                "seed": np.array([[1]], np.int64),
                "steps": np.array([[6]], np.int32),
                "preview_every": np.array([[2]], np.int32),
            }
            responses = list(connection.stream("sampler", inputs, ["latents", "image", "step"]))
            assert [int(response["step"][0, 0]) for response in responses] == [2, 4, 6]
            assert np.array_equal(responses[-1]["latents"], expect(7, 1, steps=6))
            assert not np.array_equal(responses[0]["latents"], responses[-1]["latents"])
            bad = inputs | {"label": np.array([[10]], np.int32)}
            with pytest.raises(ServeError, match="label: received 10"):
                list(connection.stream("sampler", bad, ["latents"]))
        with started.connect("http") as connection, pytest.raises(ServeError, match="decoupled"):
            connection.infer("sampler", inputs, ["latents"])


class TestVersions:
    @pytest.fixture(scope="class")
    @staticmethod
    def started(start: Callable[..., AbstractContextManager[Started]]) -> Iterator[Started]:
        with start("--backend", "python") as started:
            yield started

    def test_a_new_version_under_load_fails_no_request(
        self, started: Started, served_run: Path, expect: Expect
    ) -> None:
        stop, failed = threading.Event(), []
        versions: list[set[str]] = [set() for _ in range(4)]
        done = [0] * 4

        def hammer(index: int) -> None:
            with started.connect(PROTOCOLS[index % 2]) as connection:
                while not stop.is_set():
                    try:
                        latents = ask(connection, (index, 7))["latents"]
                        assert np.array_equal(latents, expected[index])
                    except Exception as error:
                        failed.append(repr(error))
                    done[index] += 1
                    stats = connection.statistics("sampler")["model_stats"]
                    versions[index] |= {entry["version"] for entry in stats}

        expected = [expect(index, 7) for index in range(4)]
        threads = [threading.Thread(target=hammer, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        try:
            write(served_run, started.repository, "--backend", "python", "--add-version")
            with started.connect() as connection:
                before = sum(done)
                connection.load("sampler")
                after = sum(done)
                while sum(done) < after + 40:
                    stop.wait(0.01)
                (entry,) = connection.statistics("sampler")["model_stats"]
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert failed == []
        assert after > before  # requests were answered while the new version was loaded
        assert entry["version"] == "2"
        assert all({"1", "2"} <= seen for seen in versions)

    def test_a_broken_version_leaves_the_old_one_serving(
        self, started: Started, expect: Expect
    ) -> None:
        broken = started.repository / "sampler" / "9"
        broken.mkdir()
        (broken / "model.py").write_text("raise RuntimeError('broken')\n")
        with started.connect() as connection:
            with pytest.raises(ServeError, match="broken"):
                connection.load("sampler")
            assert np.array_equal(ask(connection, (5, 6))["latents"], expect(5, 6))
            shutil.rmtree(broken)  # a folder without model.py makes this server wait for ever
            connection.load("sampler")
            assert np.array_equal(ask(connection, (5, 6))["latents"], expect(5, 6))

    def test_a_version_that_the_manifest_does_not_name_is_refused(
        self, started: Started, expect: Expect
    ) -> None:
        copy = started.repository / "sampler" / "7"
        shutil.copytree(started.repository / "sampler" / "1", copy)
        with started.connect() as connection:
            with pytest.raises(ServeError, match=r"sampler/7: not in manifest\.json"):
                connection.load("sampler")
            shutil.rmtree(copy)
            assert np.array_equal(ask(connection, (5, 6))["latents"], expect(5, 6))


@pytest.mark.parametrize(("mode", "model"), [("inprocess", "sampler"), ("bls", "denoiser")])
def test_a_killed_model_process_is_reported_and_healed(
    start: Callable[..., AbstractContextManager[Started]],
    expect: Expect,
    mode: str,
    model: str,
):
    with start("--backend", "python", "--mode", mode) as started, started.connect() as connection:
        assert check(connection).healthy
        processes = started.processes(model)
        assert processes
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        psutil.wait_procs(processes, timeout=10)
        record = check(connection)
        assert not record.healthy
        assert record.ready is True  # which is why ready is no check
        sick = [each.name for each in record.models if not each.healthy]
        assert model in sick
        healed = heal(connection, sick)
        assert healed.healthy
        assert model in healed.reloaded
        assert np.array_equal(ask(connection, (7, 1))["latents"], expect(7, 1))


def test_a_server_of_another_runtime_does_not_start(
    served_run: Path, local_triton: ModuleType, server_python: Path, tmp_path: Path
):
    repository = write(served_run, tmp_path / "triton", "--backend", "python")
    manifest = json.loads((repository / "manifest.json").read_text())
    manifest["packages"]["sampler"]["diffusers"] = "0.1.0"
    (repository / "manifest.json").write_text(json.dumps(manifest))
    with (
        pytest.raises(RuntimeError, match=r"sampler: diffusers is .*, expected 0\.1\.0"),
        local_triton.serve(repository, server_python),
    ):
        pass


def test_the_servers_packages_are_those_that_are_tested():
    """Bit equality needs the same torch, ONNX Runtime and diffusers on both sides."""
    root = Path(__file__).parents[2]

    def pinned(path: Path) -> dict[str, str]:
        lines = path.read_text().splitlines()
        return dict(line.split("==") for line in lines if "==" in line)

    server = pinned(root / "samples" / "local_triton" / "requirements.txt")
    own = pinned(root / "constraints.txt")
    for name in ("torch", "onnxruntime", "diffusers", "safetensors"):
        assert server[name] == own[name]
    assert int(server["numpy"].split(".")[0]) < 2  # else responses are empty, without a message


def test_a_text_model_with_an_autoencoder(
    local_triton: ModuleType,
    server_python: Path,
    make_tiny_run: Callable[..., Any],
    make_vae: Callable[[int], Path],
    tmp_path: Path,
):
    """Flux: embedded prompts, guidance as an input of the network, packed latents, a decoder."""
    tiny = make_tiny_run("flux")
    tiny.compile()
    options = ServeOptions(target="portable", backend="python", vae=make_vae(4), threads=1)
    repository = tmp_path / "triton"
    run_serve(tiny.run, tiny.denoiser, tiny.recipe, options, out=repository)
    prompts = tiny.denoiser.make_conditioning(1, 3)
    with OrtRunner(tiny.run / "onnx" / "portable" / "model.onnx", threads=1) as runner:
        expected = sample(
            lambda inputs: torch.from_numpy(runner.run(inputs)),
            tiny.denoiser,
            tiny.recipe.sampler,
            num=1,
            seed=4,
            conditioning=prompts,
        ).numpy()
    guidance = prompts.pop("guidance").numpy()
    with local_triton.serve(repository, server_python) as server:
        for address in (f"http://{server.http}", f"grpc://{server.grpc}"):
            with open_connection(address) as connection:
                inputs = {name: rows.numpy() for name, rows in prompts.items()}
                inputs["seed"] = np.array([[4]], np.int64)
                arrays = connection.infer("sampler", inputs, ["latents", "image"])
                assert np.array_equal(arrays["latents"], expected)
                assert arrays["image"].shape == (1, 16, 16, 3)
                assert arrays["image"].std() > 0
                inputs["guidance"] = 2 * guidance[:, None]
                other = connection.infer("sampler", inputs, ["latents"])["latents"]
                assert not np.array_equal(other, expected)
                assert check(connection).healthy
