"""The code that runs inside the server, here with a stand-in of Triton's Python utilities."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

import treeq_served
from treeq_export.cli import main
from treeq_export.targets.table import open_way
from treeq_served.denoise import denoise, make_noise, make_scheduler

FINAL = 1


class TritonError(Exception):
    INVALID_ARG, INTERNAL, CANCELLED = "INVALID_ARG", "INTERNAL", "CANCELLED"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        super().__init__(message)
        self.code = code

    def message(self) -> str:
        return str(self)


@dataclass
class Tensor:
    tensor_name: str
    array: NDArray[Any]

    def name(self) -> str:
        return self.tensor_name

    def as_numpy(self) -> NDArray[Any]:
        return self.array


@dataclass
class Response:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None

    def arrays(self) -> dict[str, NDArray[Any]]:
        assert self.error is None, str(self.error)
        return {tensor.tensor_name: tensor.array for tensor in self.output_tensors}


@dataclass
class Sender:
    sent: list[tuple[Response, int]] = field(default_factory=list)
    cancelled: bool = False

    def send(self, response: Response | None = None, flags: int = 0) -> None:
        assert response is not None
        self.sent.append((response, flags))

    def is_cancelled(self) -> bool:
        return self.cancelled


class Request:
    def __init__(self, outputs: tuple[str, ...] = (), **inputs: NDArray[Any]) -> None:
        self.tensors = {name: Tensor(name, array) for name, array in inputs.items()}
        self.outputs = outputs
        self.sender = Sender()

    def inputs(self) -> list[Tensor]:
        return list(self.tensors.values())

    def requested_output_names(self) -> tuple[str, ...]:
        return self.outputs

    def get_response_sender(self) -> Sender:
        return self.sender

    @property
    def only(self) -> Response:
        ((response, flags),) = self.sender.sent
        assert flags == FINAL
        return response


Call = Callable[[str, dict[str, NDArray[Any]]], NDArray[Any]]


class BlsRequest:
    """A call of another model; `call` answers it."""

    call: Call

    def __init__(self, *, model_name: str, inputs: list[Tensor], **_: Any) -> None:
        self.model, self.inputs = model_name, inputs

    def exec(self) -> Any:
        try:
            output = type(self).call(self.model, {t.tensor_name: t.array for t in self.inputs})
        except ValueError as error:
            failed = TritonError(str(error))
            return SimpleNamespace(has_error=lambda: True, error=lambda: failed)
        return SimpleNamespace(has_error=lambda: False, output=output)


def column(*values: float, dtype: Any = np.int32) -> NDArray[Any]:
    return np.array(values, dtype).reshape(-1, 1)


def ask(*labels: int, seeds: tuple[int, ...] = (1,), **extra: Any) -> Request:
    outputs = extra.pop("outputs", ())
    return Request(outputs, label=column(*labels), seed=column(*seeds, dtype=np.int64), **extra)


@pytest.fixture
def utilities(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in of triton_python_backend_utils."""
    module = ModuleType("triton_python_backend_utils")
    module.__dict__.update(
        TritonError=TritonError,
        Tensor=Tensor,
        InferenceResponse=Response,
        InferenceRequest=type("InferenceRequest", (BlsRequest,), {}),
        PreferredMemory=lambda *_: None,
        TRITONSERVER_MEMORY_CPU=0,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
        get_input_tensor_by_name=lambda request, name: request.tensors[name],
        get_output_tensor_by_name=lambda response, name: Tensor(name, response.output),
        using_decoupled_model_transaction_policy=lambda config: config.get("decoupled", False),
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def load(utilities: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """A function: repository, model, fields of its config -> the initialized model."""
    opened: list[Any] = []

    def load_model(repository: Path, name: str, mode: str = "inprocess", **config: Any) -> Any:
        monkeypatch.delitem(sys.modules, f"treeq_served.{name}", raising=False)
        model = import_module(f"treeq_served.{name}").TritonPythonModel()
        initialize(model, repository / name, mode, **config)
        opened.append(model)
        return model

    yield load_model
    for model in opened:
        if hasattr(model, "finalize"):
            model.finalize()


def initialize(model: Any, folder: Path, mode: str = "inprocess", **config: Any) -> None:
    """Initialize a model as Triton does, and leave torch's number of threads as it was."""
    threads = torch.get_num_threads()
    try:
        model.initialize(
            {
                "model_config": json.dumps(
                    {"parameters": {"treeq_mode": {"string_value": mode}}, **config}
                ),
                "model_repository": str(folder),
                "model_version": "1",
                "model_name": folder.name,
                "model_instance_kind": "CPU",
                "model_instance_device_id": "0",
            }
        )
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def repository(served_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits sample, served by Python models."""
    out = tmp_path_factory.mktemp("inside") / "triton"
    arguments = ["serve", "--run", str(served_run), "--out", str(out), "--backend", "python"]
    result = CliRunner().invoke(main, [*arguments, "--threads", "1"])
    assert result.exit_code == 0, result.output
    return out


class TestCopy:
    """A version of a model brings the code that runs it."""

    @pytest.fixture
    def forget(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Let a test import treeq_served anew, and leave what was imported before."""
        before = {name: module for name, module in sys.modules.items() if is_served(name)}
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
        for name in before:
            del sys.modules[name]
        yield
        for name in [name for name in sys.modules if is_served(name)]:
            del sys.modules[name]
        sys.modules.update(before)

    @pytest.mark.parametrize("model", ["sampler", "denoiser"])
    def test_it_is_the_package(self, repository: Path, model: str) -> None:
        package, copy = Path(treeq_served.__path__[0]), repository / model / "1" / "treeq_served"
        files = {path.name: path.read_bytes() for path in package.glob("*.py")}
        assert {path.name: path.read_bytes() for path in copy.glob("*.py")} == files
        assert "sampler.py" in files

    @pytest.mark.usefixtures("utilities", "forget")
    def test_it_runs_before_an_installed_one(
        self, repository: Path, expect: Callable[..., Any]
    ) -> None:
        spec = importlib.util.spec_from_file_location(
            "copied_model", repository / "sampler" / "1" / "model.py"
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.TritonPythonModel()
        initialize(model, repository / "sampler")
        request = ask(7, seeds=(5,))
        model.execute([request])
        model.finalize()
        assert np.array_equal(request.only.arrays()["latents"], expect(7, 5))
        files = [str(m.__file__) for name, m in sys.modules.items() if is_served(name)]
        assert "requests.py" in {Path(file).name for file in files}
        assert all(file.startswith(f"{repository}/sampler/1/treeq_served/") for file in files)


def is_served(module: str) -> bool:
    return module.partition(".")[0] == "treeq_served"


class TestInprocess:
    def test_a_request_equals_the_in_process_runner(
        self, load: Callable[..., Any], repository: Path, expect: Callable[..., Any]
    ) -> None:
        request = ask(7, seeds=(5,))
        load(repository, "sampler").execute([request])
        arrays = request.only.arrays()
        assert np.array_equal(arrays["latents"], expect(7, 5))
        assert arrays["image"].shape == (1, 8, 8, 1)
        assert arrays["image"].dtype == np.uint8
        assert arrays["step"].tolist() == [[2]]

    def test_merged_rows_with_other_steps_and_guidance_keep_their_results(
        self, load: Callable[..., Any], repository: Path, expect: Callable[..., Any]
    ) -> None:
        first = ask(1, 2, seeds=(3, 4), steps=column(3, 2))
        second = ask(9, seeds=(6,), guidance=column(2.5, dtype=np.float32))
        third = ask(0, seeds=(7,), steps=column(3), outputs=("latents",))
        load(repository, "sampler").execute([first, second, third])
        latents = first.only.arrays()["latents"]
        assert np.array_equal(latents[:1], expect(1, 3, steps=3))
        assert np.array_equal(latents[1:], expect(2, 4, steps=2))
        assert first.only.arrays()["step"].tolist() == [[3], [2]]
        guided = second.only.arrays()["latents"]
        assert np.array_equal(guided, expect(9, 6, guidance_scale=2.5))
        assert list(third.only.arrays()) == ["latents"]
        assert np.array_equal(third.only.arrays()["latents"], expect(0, 7, steps=3))

    @pytest.mark.parametrize(
        ("request_", "words"),
        [
            (ask(12), "sampler: label: received 12, expected 0..9."),
            (ask(-1), "sampler: label: received -1, expected 0..9."),
            (ask(1, seeds=(-2,)), "sampler: seed: received -2, expected 0.."),
            (ask(1, steps=column(0)), "sampler: steps: received 0, expected 1..1000."),
            (
                ask(1, guidance=column(np.nan, dtype=np.float32)),
                "sampler: guidance: received nan, expected a finite number >= 1.",
            ),
            (
                ask(1, guidance=column(0.5, dtype=np.float32)),
                "sampler: guidance: received 0.5, expected a finite number >= 1.",
            ),
            (ask(1, preview_every=column(-1)), "sampler: preview_every: received -1"),
            (ask(1, preview_every=column(2)), "previews need a decoupled model"),
            (
                ask(1, 2, seeds=(1, 2), steps=column(2, 3), preview_every=column(1, 1)),
                "rows of one request need equal steps and guidance",
            ),
        ],
    )
    def test_a_bad_request_is_refused_and_its_neighbour_served(
        self, load: Callable[..., Any], repository: Path, request_: Request, words: str
    ) -> None:
        good = ask(4)
        request_.sender.sent.clear()
        load(repository, "sampler").execute([request_, good])
        error = request_.only.error
        assert error is not None
        assert words in str(error)
        assert error.code == TritonError.INVALID_ARG
        assert np.isfinite(good.only.arrays()["latents"]).all()

    def test_a_cancelled_request_stops_and_its_neighbour_goes_on(
        self,
        load: Callable[..., Any],
        repository: Path,
        expect: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        model = load(repository, "sampler")
        monkeypatch.setattr(sys.modules[type(model).__module__], "CANCELLED_EVERY_S", 0.0)
        gone, other = ask(1, steps=column(4)), ask(2)
        gone.sender.cancelled = True
        model.execute([gone, other])
        assert gone.only.error is not None
        assert gone.only.error.code == TritonError.CANCELLED
        assert np.array_equal(other.only.arrays()["latents"], expect(2, 1))

    def test_a_failing_network_is_an_error_of_each_request(
        self, load: Callable[..., Any], repository: Path
    ) -> None:
        model = load(repository, "sampler")

        def fail(_: Any) -> Any:
            raise RuntimeError("no\nmemory")

        model._network = fail
        requests = [ask(1), ask(2)]
        model.execute(requests)
        assert [str(request.only.error) for request in requests] == ["sampler: no memory"] * 2
        model._network = lambda inputs: np.full_like(inputs["sample"], np.nan)
        request = ask(3)
        model.execute([request])
        assert "the sample is not finite" in str(request.only.error)


class TestBls:
    def test_it_calls_the_denoiser_with_columns(
        self,
        load: Callable[..., Any],
        utilities: ModuleType,
        repository: Path,
        served_run: Path,
        expect: Callable[..., Any],
    ) -> None:
        seen: list[dict[str, tuple[int, ...]]] = []
        with open_way(served_run, "ort", threads=1) as runner:

            def call(model: str, inputs: dict[str, NDArray[Any]]) -> NDArray[Any]:
                assert model == "denoiser"
                seen.append({name: array.shape for name, array in inputs.items()})
                flat = {
                    name: array if name == "sample" else array[:, 0]
                    for name, array in inputs.items()
                }
                return runner.run(flat)

            utilities.__dict__["InferenceRequest"].call = staticmethod(call)
            model = load(repository, "sampler", "bls")
            requests = [ask(3, seeds=(8,)), ask(4, seeds=(9,))]
            model.execute(requests)
            model._pool.shutdown()
        assert np.array_equal(requests[0].only.arrays()["latents"], expect(3, 8))
        assert np.array_equal(requests[1].only.arrays()["latents"], expect(4, 9))
        shape = {"sample": (1, 1, 8, 8), "timestep": (1, 1), "class_labels": (1, 1)}
        assert seen == [shape] * 4

    def test_a_denoiser_that_is_not_loaded_is_named(
        self, load: Callable[..., Any], utilities: ModuleType, repository: Path
    ) -> None:
        def call(*_: Any) -> NDArray[Any]:
            raise ValueError("Request for unknown model: 'denoiser' is not found")

        utilities.__dict__["InferenceRequest"].call = staticmethod(call)
        model = load(repository, "sampler", "bls")
        request = ask(1)
        model.execute([request])
        model._pool.shutdown()
        assert str(request.only.error).startswith("sampler: denoiser: Request for unknown model")


def test_previews_are_the_clean_samples_on_the_way(
    load: Callable[..., Any], repository: Path, served_run: Path
):
    model = load(repository, "sampler", decoupled=True)
    request = ask(6, seeds=(2,), steps=column(5), preview_every=column(2))
    model.execute([request])
    model._pool.shutdown()
    responses = [response.arrays() for response, _ in request.sender.sent]
    assert [flags for _, flags in request.sender.sent] == [0, 0, FINAL]
    assert [int(arrays["step"][0, 0]) for arrays in responses] == [2, 4, 5]
    clean = []
    with open_way(served_run, "ort", threads=1) as runner:
        last = denoise(
            lambda inputs: torch.from_numpy(runner.run(inputs)),
            make_noise((1, 8, 8), 1, 2),
            {"class_labels": torch.tensor([6])},
            make_scheduler("flow_match_euler", 5),
            on_step=lambda _, make: clean.append(make().numpy()),
        ).numpy()
    assert np.array_equal(responses[0]["latents"], clean[1])
    assert np.array_equal(responses[1]["latents"], clean[3])
    assert np.array_equal(responses[2]["latents"], last)


class TestDenoiser:
    def test_requests_are_run_as_one_batch(
        self, load: Callable[..., Any], repository: Path, served_run: Path
    ) -> None:
        rng = np.random.default_rng(0)
        inputs = {
            "sample": rng.standard_normal((11, 1, 8, 8)).astype(np.float32),
            "timestep": np.linspace(0, 900, 11, dtype=np.float32),
            "class_labels": np.arange(11) % 10,
        }
        bounds = [(0, 2), (2, 3), (3, 11)]
        requests = [Request(**{n: a[low:high] for n, a in inputs.items()}) for low, high in bounds]
        responses = load(repository, "denoiser").execute(requests)
        with open_way(served_run, "ort", threads=1) as runner:
            expected = runner.run(inputs)
        for (low, high), response in zip(bounds, responses, strict=True):
            assert np.array_equal(response.arrays()["prediction"], expected[low:high])

    def test_nan_is_refused(self, load: Callable[..., Any], repository: Path) -> None:
        def request(value: float) -> Request:
            return Request(
                sample=np.full((1, 1, 8, 8), value, np.float32),
                timestep=np.zeros(1, np.float32),
                class_labels=np.zeros(1, np.int64),
            )

        bad, good = load(repository, "denoiser").execute([request(np.nan), request(1.0)])
        assert bad.error.code == TritonError.INVALID_ARG
        assert str(bad.error).startswith("denoiser: sample: holds NaN or infinity")
        assert np.isfinite(good.arrays()["prediction"]).all()


class TestManifest:
    @pytest.mark.parametrize("model", ["sampler", "denoiser"])
    def test_a_changed_file_is_refused_when_the_model_is_loaded(
        self, load: Callable[..., Any], served_run: Path, tmp_path: Path, model: str
    ) -> None:
        out = tmp_path / "triton"
        arguments = ["serve", "--run", str(served_run), "--out", str(out), "--backend", "python"]
        assert CliRunner().invoke(main, arguments).exit_code == 0
        settings = out / model / "1" / "settings.json"
        settings.write_text(settings.read_text() + " ")
        with pytest.raises(ValueError, match="not the file that manifest"):
            load(out, model)
        settings.unlink()
        with pytest.raises(ValueError, match="Copy the whole repository again"):
            load(out, model)

    def test_a_sampler_checks_the_denoiser_that_it_opens(
        self, load: Callable[..., Any], served_run: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "triton"
        arguments = ["serve", "--run", str(served_run), "--out", str(out), "--backend", "python"]
        assert CliRunner().invoke(main, arguments).exit_code == 0
        graph = out / "denoiser" / "1" / "model.onnx"
        graph.write_bytes(graph.read_bytes()[:-1] + b"x")
        with pytest.raises(ValueError, match=r"model\.onnx: not the file that manifest"):
            load(out, "sampler")

    def test_a_runtime_of_another_version_is_refused(
        self, load: Callable[..., Any], served_run: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "triton"
        arguments = ["serve", "--run", str(served_run), "--out", str(out), "--backend", "python"]
        assert CliRunner().invoke(main, arguments).exit_code == 0
        manifest = json.loads((out / "manifest.json").read_text())
        manifest["packages"]["sampler"]["onnxruntime"] = "0.1.0"
        (out / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=r"onnxruntime is .*, expected 0\.1\.0"):
            load(out, "sampler")
        manifest["packages"]["sampler"] = {"no-such-package": "1.0"}
        (out / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match="no-such-package is not installed"):
            load(out, "sampler")
        (out / "manifest.json").unlink()
        with pytest.raises(ValueError, match="cannot be read"):
            load(out, "sampler")


@pytest.mark.parametrize("packed", [False, True])
def test_the_decoder_paints_what_diffusers_decodes(
    load: Callable[..., Any],
    make_tiny_run: Callable[..., Any],
    make_vae: Callable[..., Path],
    tmp_path: Path,
    packed: bool,
):
    from diffusers import AutoencoderKL

    from treeq_export.serve.options import ServeOptions
    from treeq_export.serve.stage import run_serve

    tiny = make_tiny_run("flux" if packed else "dit")
    tiny.compile()
    out = tmp_path / "triton"
    options = ServeOptions(backend="python", vae=make_vae(4), target="portable")
    run_serve(tiny.run, tiny.denoiser, tiny.recipe, options, out=out)
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    (response,) = load(out, "vae_decoder").execute([Request(latents=latents)])
    images = response.arrays()["image"]
    assert images.shape == (2, 16, 16, 3)
    vae = AutoencoderKL.from_pretrained(make_vae(4)).eval()
    with torch.no_grad():
        decoded = vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor).sample
    expected = ((decoded.permute(0, 2, 3, 1).double() + 1) * 127.5).clamp(0, 255).round().numpy()
    assert np.abs(images - expected).max() <= 1
    settings = json.loads((out / "sampler" / "1" / "settings.json").read_text())
    assert settings["image"] == "vae"
