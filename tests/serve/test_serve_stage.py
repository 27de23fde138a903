"""Writing repositories: what is in them, what is refused, what a kill leaves. No server."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as schema

from treeq_export.artefacts import remove_stale
from treeq_export.cli import main
from treeq_export.errors import ServeError, TreeqError
from treeq_export.serve import stage as serve_stage
from treeq_export.serve.lint import lint_repository
from treeq_export.serve.options import ServeOptions
from treeq_export.serve.stage import run_serve

Write = Callable[..., Path]


def invoke(*args: object) -> Result:
    return CliRunner().invoke(main, ["serve", *map(str, args)])


def read_config(path: Path) -> Any:
    return text_format.Parse(path.read_text(), schema.ModelConfig())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def launch(repository: Path) -> "subprocess.CompletedProcess[str]":
    """Run launch.sh with a program that prints its arguments in the place of the server."""
    return subprocess.run(
        [repository / "launch.sh"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "TRITONSERVER": "/bin/echo"},
    )


def files_of(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): digest(p) for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def ort_repository(served_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ort") / "triton"
    result = invoke("--run", served_run, "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out / "launch.sh")
    return out


class TestOnnxRuntime:
    def test_the_denoiser_has_the_inputs_of_the_graph(
        self, ort_repository: Path, served_run: Path
    ) -> None:
        config = read_config(ort_repository / "denoiser" / "config.pbtxt")
        assert config.platform == "onnxruntime_onnx"
        assert config.max_batch_size == 8  # of the recipe, which is below 16
        graph = onnx.load(served_run / "onnx" / "ort" / "model.onnx").graph
        assert [tensor.name for tensor in config.input] == [value.name for value in graph.input]
        dims = {tensor.name: list(tensor.dims) for tensor in config.input}
        assert dims == {"sample": [1, 8, 8], "timestep": [1], "class_labels": [1]}
        dropped = [t.name for t in config.input if t.HasField("reshape") and not t.reshape.shape]
        assert dropped == ["timestep", "class_labels"]
        assert [tensor.name for tensor in config.output] == ["prediction"]

    def test_the_custom_op_library_is_named_by_its_absolute_path(
        self, ort_repository: Path
    ) -> None:
        config = read_config(ort_repository / "denoiser" / "config.pbtxt")
        (library,) = config.model_operations.op_library_filename
        assert library == str(ort_repository / "denoiser" / "lib" / "libtreeq_ort.so")
        assert Path(library).is_file()

    def test_there_is_a_warmup_for_each_batch_of_the_profile(self, ort_repository: Path) -> None:
        config = read_config(ort_repository / "denoiser" / "config.pbtxt")
        assert [warmup.batch_size for warmup in config.model_warmup] == [1, 2, 8]
        for warmup in config.model_warmup:
            assert set(warmup.inputs) == {"sample", "timestep", "class_labels"}

    def test_the_sampler_reads_the_denoiser_of_its_version(self, ort_repository: Path) -> None:
        settings = json.loads((ort_repository / "sampler" / "1" / "settings.json").read_text())
        assert settings["network"]["file"] == "1/model.onnx"
        assert (ort_repository / "denoiser" / settings["network"]["file"]).is_file()
        assert settings["num_classes"] == 10
        assert settings["null"] == {"class_labels": 10.0}
        assert settings["image"] == "pixels"

    def test_the_manifest_holds_every_file_of_the_models(self, ort_repository: Path) -> None:
        manifest = json.loads((ort_repository / "manifest.json").read_text())
        found = {name: d for name, d in files_of(ort_repository).items() if "/" in name}
        assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == found
        assert manifest["models"] == {"denoiser": [1], "sampler": [1]}
        assert set(manifest["packages"]["sampler"]) == {"torch", "diffusers", "onnxruntime"}
        assert manifest["denoiser"]["profile"] == {"min": 1, "opt": 2, "max": 8}

    def test_writing_again_gives_the_same_bytes(
        self, ort_repository: Path, served_run: Path, tmp_path: Path
    ) -> None:
        before = files_of(ort_repository)
        assert invoke("--run", served_run, "--out", ort_repository).exit_code == 0
        assert files_of(ort_repository) == before

    def test_dry_run_prints_the_exact_command(self, ort_repository: Path) -> None:
        done = subprocess.run(
            [ort_repository / "launch.sh", "--dry-run", "--log-verbose=1"],
            capture_output=True,
            text=True,
            check=True,
            env={"PATH": "/usr/bin:/bin", "HTTP_PORT": "9000", "TRITON_CONFIG": "cpu"},
        )
        assert done.stdout.split() == [
            "tritonserver",
            f"--model-repository={ort_repository}",
            "--model-control-mode=explicit",
            "--load-model=sampler",
            "--http-address=127.0.0.1",
            "--http-port=9000",
            "--grpc-address=127.0.0.1",
            "--grpc-port=8001",
            "--metrics-address=127.0.0.1",
            "--metrics-port=8002",
            "--model-config-name=cpu",
            "--log-verbose=1",
        ]
        assert done.stderr == ""

    def test_launch_refuses_a_changed_file(self, ort_repository: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(ort_repository, tmp_path / "copy"))
        model = copy / "denoiser" / "1" / "model.onnx"
        model.write_bytes(model.read_bytes()[:-1] + b"x")
        done = launch(copy)
        assert done.returncode == 1
        assert f"{model}: not the file that manifest.json names." in done.stderr
        assert done.stdout == ""

    def test_launch_refuses_a_moved_repository(self, ort_repository: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(ort_repository, tmp_path / "copy"))
        done = launch(copy)
        assert done.returncode == 1
        assert f"{copy}: written for {ort_repository}" in done.stderr

    def test_launch_refuses_an_unfit_path(self, ort_repository: Path, tmp_path: Path) -> None:
        done = launch(Path(shutil.copytree(ort_repository, tmp_path / "a b")))
        assert done.returncode == 1
        assert done.stdout == ""
        assert "which Triton's Python backend cannot have in a path. Move" in done.stderr

    @pytest.mark.parametrize(
        ("address", "arguments", "warns"),
        [
            ("", [], False),
            ("127.0.0.1", [], False),
            ("127.1.2.3", [], False),
            ("0.0.0.0", [], True),
            ("10.0.0.7", [], True),
            ("0.0.0.0", ["--http-restricted-api=model-repository:k=v"], False),
        ],
    )
    def test_launch_warns_of_open_addresses(
        self, ort_repository: Path, address: str, arguments: list[str], warns: bool
    ) -> None:
        environment = {"PATH": "/usr/bin:/bin", "TRITONSERVER": "/bin/echo"}
        done = subprocess.run(
            [ort_repository / "launch.sh", *arguments],
            capture_output=True,
            text=True,
            check=False,  # that Python has not the packages
            env=environment | ({"TRITON_ADDRESS": address} if address else {}),
        )
        assert (f"listens on {address}: whoever reaches" in done.stderr) == warns


def test_modes_and_batching_are_in_the_configs(served_run: Path, tmp_path: Path):
    invoke("--run", served_run, "--out", tmp_path / "a", "--mode", "bls")
    sampler = read_config(tmp_path / "a" / "sampler" / "config.pbtxt")
    denoiser = read_config(tmp_path / "a" / "denoiser" / "config.pbtxt")
    assert sampler.parameters["treeq_mode"].string_value == "bls"
    assert not sampler.HasField("dynamic_batching")
    assert denoiser.dynamic_batching.max_queue_delay_microseconds == 100
    launch = (tmp_path / "a" / "launch.sh").read_text()
    assert "--load-model=denoiser" in launch
    invoke("--run", served_run, "--out", tmp_path / "b", "--no-dynamic-batching")
    for model in ("sampler", "denoiser"):
        config = read_config(tmp_path / "b" / model / "config.pbtxt")
        assert not config.HasField("dynamic_batching")
    invoke("--run", served_run, "--out", tmp_path / "d", "--mode", "bls", "--instances", "3")
    counts = {
        model: read_config(tmp_path / "d" / model / "config.pbtxt").instance_group[0].count
        for model in ("denoiser", "sampler")
    }
    assert counts == {"denoiser": 3, "sampler": 1}
    invoke("--run", served_run, "--out", tmp_path / "c", "--decoupled")
    assert read_config(
        tmp_path / "c" / "sampler" / "config.pbtxt"
    ).model_transaction_policy.decoupled


@pytest.fixture(scope="module")
def tensorrt_repository(
    engine_run: Path, plugin_library: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("trt") / "triton"
    result = invoke(
        "--run",
        engine_run,
        "--out",
        out,
        "--target",
        "tensorrt",
        "--plugin-library",
        plugin_library,
        "--root",
        "/models/digits",
    )
    assert result.exit_code == 0, result.output
    return out


class TestTensorrt:
    """The engine is a stand-in: bytes under the manifest of TensorRT, which is not here."""

    def test_config(self, tensorrt_repository: Path) -> None:
        config = read_config(tensorrt_repository / "denoiser" / "config.pbtxt")
        assert config.platform == "tensorrt_plan"
        assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU
        cpu = read_config(tensorrt_repository / "denoiser" / "configs" / "cpu.pbtxt")
        assert cpu.instance_group[0].kind == schema.ModelInstanceGroup.KIND_CPU
        labels = next(tensor for tensor in config.input if tensor.name == "class_labels")
        assert labels.data_type == schema.TYPE_INT32
        assert (tensorrt_repository / "denoiser" / "1" / "model.plan").is_file()

    def test_the_plugin_is_loaded_by_flag_or_preload(self, tensorrt_repository: Path) -> None:
        def dry_run(**environment: str) -> str:
            done = subprocess.run(
                [tensorrt_repository / "launch.sh", "--dry-run"],
                capture_output=True,
                text=True,
                check=True,
                env={"PATH": "/usr/bin:/bin", **environment},
            )
            return done.stdout

        plugin = tensorrt_repository / "denoiser" / "lib" / "libtreeq_plugins.so"
        assert f"--backend-config=tensorrt,plugins={plugin}" in dry_run().replace("\\", "")
        preloaded = dry_run(TREEQ_PRELOAD="1")
        assert preloaded.startswith(f"env LD_PRELOAD={plugin} tritonserver ")
        assert "--backend-config" not in preloaded

    def test_the_manifest_names_runtime_gpu_and_profile(self, tensorrt_repository: Path) -> None:
        manifest = json.loads((tensorrt_repository / "manifest.json").read_text())
        assert manifest["gpu"] == "sm_89"
        assert manifest["backend_version"] == "10.13.3.9"
        assert manifest["denoiser"]["profile"] == {"min": 1, "opt": 2, "max": 8}
        plugin = manifest["files"]["denoiser/lib/libtreeq_plugins.so"]["sha256"]
        assert plugin == digest(tensorrt_repository / "denoiser" / "lib" / "libtreeq_plugins.so")

    def test_an_engine_of_rtx_is_served_by_python(self, engine_run: Path, tmp_path: Path) -> None:
        result = invoke(
            "--run",
            engine_run,
            "--out",
            tmp_path / "t",
            "--target",
            "tensorrt",
            "--runtime",
            "tensorrt-rtx",
        )
        assert result.exit_code == 0, result.output
        config = read_config(tmp_path / "t" / "denoiser" / "config.pbtxt")
        assert config.backend == "python"
        settings = json.loads((tmp_path / "t" / "denoiser" / "1" / "settings.json").read_text())
        assert settings["runtime"] == "tensorrt-rtx"
        assert settings["gpu"] == "sm_89"


@pytest.mark.parametrize("family", ["pixart", "sd3", "flux"])
def test_text_models_take_embeddings(
    make_tiny_run: Callable[..., Any], family: str, tmp_path: Path
):
    tiny = make_tiny_run(family)
    tiny.compile()
    options = ServeOptions(target="portable", backend="python")
    written = run_serve(tiny.run, tiny.denoiser, tiny.recipe, options, out=tmp_path / "triton")
    config = read_config(tmp_path / "triton" / "sampler" / "config.pbtxt")
    inputs = {tensor.name: list(tensor.dims) for tensor in config.input}
    assert "label" not in inputs
    shape = tiny.denoiser.row_shapes["encoder_hidden_states"]
    assert inputs["encoder_hidden_states"] == list(shape)
    assert [tensor.name for tensor in config.output] == ["latents", "step"]
    settings = written.served.settings
    assert settings.embedded_guidance == (3.5 if family == "flux" else None)
    assert settings.null.get("encoder_attention_mask", 1.0) == 1.0
    assert settings.null["encoder_hidden_states"] == 0.0


class TestVersions:
    @pytest.fixture
    def repository(self, served_run: Path, tmp_path: Path) -> Path:
        out = tmp_path / "triton"
        assert invoke("--run", served_run, "--out", out).exit_code == 0
        return out

    def test_a_version_is_added(self, repository: Path, served_run: Path) -> None:
        before = files_of(repository)
        result = invoke("--run", served_run, "--out", repository, "--add-version")
        assert result.exit_code == 0, result.output
        after = files_of(repository)
        kept = {name: value for name, value in before.items() if name != "manifest.json"}
        assert kept.items() <= after.items()
        manifest = json.loads((repository / "manifest.json").read_text())
        assert manifest["models"] == {"denoiser": [1, 2], "sampler": [1, 2]}
        assert list(manifest["plan_sha256"]) == ["1", "2"]
        settings = json.loads((repository / "sampler" / "2" / "settings.json").read_text())
        assert settings["network"]["file"] == "2/model.onnx"

    def test_a_removed_version_does_not_keep_the_server_from_starting(
        self, repository: Path, served_run: Path
    ) -> None:
        assert invoke("--run", served_run, "--out", repository, "--add-version").exit_code == 0
        check = [sys.executable, str(repository / "check_manifest.py")]
        for version in ("2", "1"):
            assert subprocess.run(check, check=False).returncode == 0
            for model in ("denoiser", "sampler"):
                shutil.rmtree(repository / model / version)
        done = subprocess.run(check, check=False, capture_output=True, text=True)
        assert done.returncode == 1
        assert f"{repository / 'denoiser'}: no version." in done.stderr

    def test_one_with_another_config_is_refused(self, repository: Path, served_run: Path) -> None:
        before = files_of(repository)
        result = invoke(
            "--run", served_run, "--out", repository, "--add-version", "--max-batch", "4"
        )
        assert result.exit_code == 1
        assert "config.pbtxt: would change (inputs, batch or library)." in result.stderr
        assert files_of(repository) == before

    def test_a_killed_addition_leaves_no_version_that_loads(
        self, repository: Path, served_run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manifest = json.loads((repository / "manifest.json").read_text())

        def die(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(serve_stage, "check_repository", die)
        result = invoke("--run", served_run, "--out", repository, "--add-version")
        assert result.exit_code != 0
        now = json.loads((repository / "manifest.json").read_text())
        assert now.pop("pending") == 2
        assert now | {"pending": None} == manifest
        monkeypatch.undo()
        again = invoke("--run", served_run, "--out", repository, "--add-version")
        assert again.exit_code == 0, again.output
        now = json.loads((repository / "manifest.json").read_text())
        assert (now["models"]["sampler"], now["pending"]) == ([1, 2], None)

    def test_without_a_repository(self, served_run: Path, tmp_path: Path) -> None:
        result = invoke("--run", served_run, "--out", tmp_path / "none", "--add-version")
        assert result.exit_code == 1
        assert "Write the repository first" in result.stderr
        assert not (tmp_path / "none").exists()


def test_a_failed_lint_leaves_nothing(
    served_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise ServeError("sampler/config.pbtxt: wrong.")

    monkeypatch.setattr(serve_stage, "check_repository", refuse)
    result = invoke("--run", served_run, "--out", tmp_path / "triton")
    assert result.exit_code == 1
    assert list(tmp_path.iterdir()) == []
    assert remove_stale(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "portable"], "model.onnx: missing. Add the target to compile.targets"),
        (["--target", "tensorrt-native"], "model.onnx: missing."),
        (["--target", "tensorrt"], "no engine. Run `treeq-export build --run"),
        (["--max-batch", "9"], "--max-batch 9: ort takes at most 8 rows."),
        (["--max-batch", "0"], "--max-batch: received 0, expected 1.."),
        (["--instances", "0"], "--instances: received 0, expected 1..64."),
        (["--queue-delay-us", "500"], "--queue-delay-us: received 500, expected 0..200."),
        (["--backend", "tensorrt"], "--backend tensorrt: target ort is no engine."),
        (["--target", "tensorrt", "--backend", "onnxruntime"], "target tensorrt is an engine."),
        (
            ["--target", "tensorrt", "--backend", "tensorrt", "--runtime", "tensorrt-rtx"],
            "does not load engines of TensorRT-RTX",
        ),
        (["--root", "models"], "--root models: expected an absolute path"),
        (["--vae", "nowhere"], "nowhere/config.json: cannot be read"),
    ],
)
def test_what_does_not_fit_is_one_line(
    served_run: Path, tmp_path: Path, options: list[str], words: str
):
    result = invoke("--run", served_run, "--out", tmp_path / "triton", *options)
    assert result.exit_code == 1
    assert words in result.stderr
    assert result.stderr.strip().count("\n") <= 1  # the progress line and the error
    assert not (tmp_path / "triton").exists()


def test_a_folder_that_is_no_repository_is_left_alone(served_run: Path, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo").write_text("precious")
    result = invoke("--run", served_run, "--out", tmp_path / "mine")
    assert result.exit_code == 1
    assert "exists but was not written by" in result.stderr
    assert (tmp_path / "mine" / "photo").read_text() == "precious"


def test_several_engines_need_a_choice(engine_run: Path, plugin_library: Path, tmp_path: Path):
    run = Path(shutil.copytree(engine_run, tmp_path / "run"))
    folder = run / "engines" / "tensorrt" / "tensorrt"
    shutil.copytree(folder / "sm_89", folder / "sm_80")
    arguments = ["--run", run, "--out", tmp_path / "t", "--target", "tensorrt"]
    result = invoke(*arguments, "--plugin-library", plugin_library)
    assert "engines for sm_80, sm_89. Choose one with --gpu." in result.stderr
    result = invoke(*arguments, "--gpu", "sm_90")
    assert "no engine for sm_90; there is sm_80, sm_89." in result.stderr
    result = invoke(*arguments, "--gpu", "sm_89")
    assert "libtreeq_plugins.so: not found, and the engine needs its plugins." in result.stderr


def test_options_have_one_default_each():
    """Those of the command line are those of ServeOptions."""
    command = main.commands["serve"]
    fields = {field.name: field.default for field in dataclasses.fields(ServeOptions)}
    given = command.make_context("serve", ["--run", "x"]).params
    assert {name: given[name] for name in fields} == fields


def test_errors_are_of_our_tree():
    assert issubclass(ServeError, TreeqError)
    assert ServeError("x").kind == "repository"


@pytest.mark.slow
def test_block_products_are_not_served_by_a_backend_that_quantizes_their_inputs(
    make_tiny_run: Callable[..., Any], tmp_path: Path
):
    tiny = make_tiny_run("dit", activation_bits=None)
    tiny.compile()
    options = ServeOptions(target="portable")
    with pytest.raises(ServeError, match=r"^--backend onnxruntime: portable has layers of 4-bit"):
        run_serve(tiny.run, tiny.denoiser, tiny.recipe, options, out=tmp_path / "triton")
    assert not (tmp_path / "triton").exists()
    for accepted in (ServeOptions(target="portable", backend="python"), ServeOptions(target="ort")):
        run_serve(tiny.run, tiny.denoiser, tiny.recipe, accepted, out=tmp_path / accepted.target)


class TestOthers:
    """What serve did not write is kept, or the command is refused; nothing is removed."""

    @pytest.fixture
    def repository(self, ort_repository: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(ort_repository, tmp_path / "triton"))

    def test_what_the_operator_added_is_kept(self, repository: Path, served_run: Path) -> None:
        (repository / "other" / "1").mkdir(parents=True)
        (repository / "empty").mkdir()
        (repository / "link").symlink_to("other")
        mine = ("other/1/model.onnx", "notes.txt", "denoiser/labels.txt", "sampler/1/extra.bin")
        for name in mine:
            (repository / name).write_text(name)
        assert invoke("--run", served_run, "--out", repository).exit_code == 0
        assert all((repository / name).read_text() == name for name in mine)
        assert (repository / "empty").is_dir()
        assert (repository / "link").readlink() == Path("other")
        manifest = json.loads((repository / "manifest.json").read_text())
        assert not set(mine) & set(manifest["files"])

    def test_what_a_killed_process_had_moved_away_is_kept(
        self, repository: Path, served_run: Path
    ) -> None:
        (repository / "notes.txt").write_text("mine")
        replaced = repository.parent / ".treeq-1-killed.partial" / ".replaced"
        replaced.mkdir(parents=True)
        repository.rename(replaced / repository.name)
        assert invoke("--run", served_run, "--out", repository).exit_code == 0
        assert (repository / "notes.txt").read_text() == "mine"
        assert list(repository.parent.iterdir()) == [repository]

    @pytest.mark.parametrize("name", ["denoiser/7/model.onnx", "vae_decoder/1/model.py"])
    def test_what_would_be_in_the_way_of_a_server_is_kept_or_refused(
        self, repository: Path, served_run: Path, name: str
    ) -> None:
        (repository / name).parent.mkdir(parents=True)
        (repository / name).write_text("mine")
        result = invoke("--run", served_run, "--out", repository)
        assert (repository / name).read_text() == "mine"
        if name.startswith("denoiser"):
            assert result.exit_code == 1
            assert "denoiser/7: not written by serve, and in the way" in result.stderr

    @pytest.mark.parametrize("content", ['{"name": "a web app"}', "[]", "no json", None])
    def test_another_folder_is_refused_and_untouched(
        self, served_run: Path, tmp_path: Path, content: str | None
    ) -> None:
        site = tmp_path / "site"
        site.mkdir()
        (site / "precious.txt").write_text("years of work")
        if content is not None:
            (site / "manifest.json").write_text(content)
        before = files_of(site)
        result = invoke("--run", served_run, "--out", site)
        assert result.exit_code == 1
        assert "exists but was not written by" in result.stderr
        assert files_of(site) == before
        assert [path.name for path in tmp_path.iterdir()] == ["site"]

    def test_a_version_of_the_operator_is_not_replaced(
        self, served_run: Path, tmp_path: Path
    ) -> None:
        repository = tmp_path / "triton"
        assert invoke("--run", served_run, "--out", repository).exit_code == 0
        (repository / "denoiser" / "2").mkdir()
        (repository / "denoiser" / "2" / "mine").touch()
        before = files_of(repository)
        result = invoke("--run", served_run, "--out", repository, "--add-version")
        assert result.exit_code == 1
        assert "denoiser/2: is there and not in manifest.json" in result.stderr
        assert files_of(repository) == before

    def test_an_empty_folder_will_do(self, served_run: Path, tmp_path: Path) -> None:
        (tmp_path / "triton").mkdir()
        assert invoke("--run", served_run, "--out", tmp_path / "triton").exit_code == 0


class TestProof:
    """Only what compile wrote is served, bisected or built."""

    @pytest.mark.parametrize("target", ["ort", "tensorrt", "fp32"])
    def test_a_flipped_bit_is_refused(self, served_run: Path, tmp_path: Path, target: str) -> None:
        run = Path(shutil.copytree(served_run, tmp_path / "run"))
        graph = run / "onnx" / target / "model.onnx"
        content = bytearray(graph.read_bytes())
        content[len(content) // 2] ^= 0x40
        graph.write_bytes(content)
        result = invoke("--run", run)
        assert result.exit_code == 1
        line = result.stderr.splitlines()[-1]
        assert f"{graph}: not the file that compile wrote" in line
        assert f"Run `treeq-export compile --run {run}` first." in line
        assert not (run / "triton").exists()

    def test_an_engine_that_is_not_its_manifests_is_refused(
        self, engine_run: Path, plugin_library: Path, tmp_path: Path
    ) -> None:
        run = Path(shutil.copytree(engine_run, tmp_path / "run"))
        engine = run / "engines" / "tensorrt" / "tensorrt" / "sm_89" / "model.engine"
        engine.write_bytes(engine.read_bytes().replace(b"stand-in", b"standing"))
        result = invoke(*("--run", run, "--target", "tensorrt", "--plugin-library", plugin_library))
        assert result.exit_code == 1
        assert f"{engine}: not the file that" in result.stderr.splitlines()[-1]
        assert not (run / "triton").exists()

    def test_lint_finds_a_changed_and_a_missing_file(
        self, ort_repository: Path, tmp_path: Path
    ) -> None:
        root = Path(shutil.copytree(ort_repository, tmp_path / "triton"))
        settings = root / "sampler" / "1" / "settings.json"
        settings.write_bytes(settings.read_bytes().replace(b'"steps": 2', b'"steps": 3'))
        (root / "sampler" / "1" / "treeq_served" / "denoise.py").unlink()
        found = {
            (finding.path.as_posix(), finding.message.split(",")[0])
            for finding in lint_repository(root, ort_repository)
            if finding.rule == "file-is-as-written"
        }
        assert found == {
            ("sampler/1/settings.json", "received other bytes"),
            ("sampler/1/treeq_served/denoise.py", "received no such file"),
        }

    def test_a_read_only_run_is_served_elsewhere_and_not_touched(
        self, served_run: Path, tmp_path: Path
    ) -> None:
        before = {path: path.stat().st_mtime_ns for path in (served_run, *served_run.rglob("*"))}
        assert invoke("--run", served_run, "--out", tmp_path / "triton").exit_code == 0
        after = {path: path.stat().st_mtime_ns for path in (served_run, *served_run.rglob("*"))}
        assert after == before
