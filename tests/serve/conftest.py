"""Runs to serve, and a real Triton server: the wheel's, in its own environment."""

import hashlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.required import skip_or_fail
from treeq_export import __version__
from treeq_export.artefacts import sha256_of_file
from treeq_export.model.sampler import sample
from treeq_export.pipeline.workspace import Workspace
from treeq_export.records.build import (
    EngineManifest,
    PluginReference,
    ShapeRange,
    VerifierSummary,
)
from treeq_export.targets.table import open_way

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def server_python() -> Path:
    """Python of the server's environment."""
    path = Path(os.environ.get("TREEQ_TRITON_PYTHON", ROOT / ".triton" / "bin" / "python"))
    if not path.is_file():
        skip_or_fail("triton", f"{path}: missing. Run `make triton-env`.")
    return path


def load_sample(name: str) -> ModuleType:
    """Import a program of samples/local_triton."""
    path = ROOT / "samples" / "local_triton" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"local_triton_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def local_triton() -> ModuleType:
    """The sample that starts the wheel's server."""
    return load_sample("server")


@pytest.fixture(scope="session")
def served_run(make_digits_run: Callable[..., Path]) -> Path:
    """The digits sample, W4A4 with branches, compiled for ort and tensorrt. Read-only."""
    return make_digits_run("ort", "tensorrt")


@pytest.fixture(scope="session")
def engine_run(served_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`served_run` with STAND-INS of engines for sm_89: bytes under right manifests.

    TensorRT is not here to build one, and no server here can load one.
    """
    run = Path(shutil.copytree(served_run, tmp_path_factory.mktemp("engines") / "run"))
    for runtime, version in (("tensorrt", "10.13.3.9"), ("tensorrt-rtx", "1.7.1.116")):
        folder = run / "engines" / runtime / "tensorrt" / "sm_89"
        folder.mkdir(parents=True)
        engine = b"stand-in of an engine"
        (folder / "model.engine").write_bytes(engine)
        shapes = {"sample": [1, 8, 8], "timestep": [], "class_labels": []}
        manifest = EngineManifest(
            treeq_version=__version__,
            runtime=runtime,
            runtime_version=version,
            gpu="sm_89",
            target="tensorrt",
            key="0" * 64,
            engine_sha256=hashlib.sha256(engine).hexdigest(),
            engine_bytes=len(engine),
            graph_sha256=sha256_of_file(run / "onnx" / "tensorrt" / "model.onnx"),
            data_sha256=None,
            plan_sha256="0" * 64,
            profile={
                name: ShapeRange(min=[1, *shape], opt=[2, *shape], max=[8, *shape])
                for name, shape in shapes.items()
            },
            bits={},
            plugins=[PluginReference(name="QLinear", version="1", namespace="treeq")],
            build_s=0.0,
            peak_bytes=0,
            verifier=VerifierSummary(
                num_quantized=0,
                num_plugins=0,
                num_int8_gemms=0,
                num_weight_only=0,
                num_engine_layers=0,
            ),
        )
        (folder / "manifest.json").write_text(manifest.model_dump_json())
    return run


@pytest.fixture(scope="session")
def plugin_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A STAND-IN of libtreeq_plugins.so, which needs TensorRT's headers to be built."""
    path = tmp_path_factory.mktemp("plugin") / "libtreeq_plugins.so"
    path.write_bytes(b"stand-in of a plugin library")
    return path


@pytest.fixture(scope="session")
def make_vae(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A function: latent channels -> the folder of a tiny random AutoencoderKL, factor 2."""
    made: dict[int, Path] = {}

    def make(latent_channels: int) -> Path:
        if latent_channels not in made:
            import torch
            from diffusers import AutoencoderKL

            torch.manual_seed(0)
            vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
                up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
                block_out_channels=(8, 8),
                norm_num_groups=4,
                latent_channels=latent_channels,
            )
            made[latent_channels] = tmp_path_factory.mktemp("vae")
            vae.save_pretrained(made[latent_channels])
        return made[latent_channels]

    return make


@pytest.fixture(scope="session")
def expect(served_run: Path) -> Callable[..., NDArray[np.float32]]:
    """A function: label, seed, fields of the sampler section -> the in-process runner's sample."""
    with Workspace.reopen(served_run) as workspace:
        denoiser, section = workspace.denoiser, workspace.recipe.sampler

    def sample_one(
        label: int, seed: int, target: str = "ort", **fields: Any
    ) -> NDArray[np.float32]:
        with open_way(served_run, target, threads=1) as runner:
            return sample(
                lambda inputs: torch.from_numpy(runner.run(inputs)),
                denoiser,
                section.model_copy(update=fields),
                num=1,
                seed=seed,
                conditioning={"class_labels": torch.tensor([label])},
            ).numpy()

    return sample_one
