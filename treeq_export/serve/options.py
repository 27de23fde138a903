"""What is to be served, and how; checked before anything is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from treeq_export.errors import ServeError
from treeq_export.targets.names import ENGINES, ORT
from treeq_export.targets.table import target_named
from treeq_served.check_manifest import find_unfit

Backend = Literal["onnxruntime", "tensorrt", "python"]
Mode = Literal["inprocess", "bls"]
RuntimeChoice = Literal["tensorrt", "tensorrt-rtx"]
MOST_DELAY_US = 200
USUAL_BATCH = 16


@dataclass(frozen=True)
class ServeOptions:
    """How a run is served.

    Attributes:
        target: Compiled target: "ort", "portable", "tensorrt" or "tensorrt-native".
        backend: Backend of the model `denoiser`; None takes the target's own: ONNX Runtime,
            TensorRT, or Python for engines of TensorRT-RTX, which no backend of Triton loads.
        mode: "inprocess": the sampler runs the denoiser itself; "bls": it calls it.
        runtime: Runtime that the engine was built with.
        gpu: Architecture that the engine was built for; None takes the only one.
        root: The repository's place on the server; None is the place where it is written.
        max_batch: Most rows of a call; None is 16, or what the target takes where that is less.
        dynamic_batching: Whether the server may merge requests.
        queue_delay_us: Longest wait of a request for others, microseconds.
        instances: Copies of the denoiser; in mode inprocess, of the sampler, a process each.
        concurrency: Most requests that are sampled at a time in mode bls.
        threads: Threads inside an operator of ONNX Runtime; None lets it choose.
        decoupled: Whether the sampler streams previews: gRPC only.
        vae: Folder of a diffusers AutoencoderKL; None serves latents of latent models.
        plugin_library: libtreeq_plugins.so, where it is not installed beside the package.
        add_version: Add the next version to a repository that is there.
    """

    target: str = ORT
    backend: Backend | None = None
    mode: Mode = "inprocess"
    runtime: RuntimeChoice = "tensorrt"
    gpu: str | None = None
    root: Path | None = None
    max_batch: int | None = None
    dynamic_batching: bool = True
    queue_delay_us: int = 100
    instances: int = 1
    concurrency: int = 16
    threads: int | None = None
    decoupled: bool = False
    vae: Path | None = None
    plugin_library: Path | None = None
    add_version: bool = False

    @property
    def is_engine(self) -> bool:
        """Whether an engine is served, not a graph."""
        return target_named(self.target).is_engine

    @property
    def chosen_backend(self) -> Backend:
        """The backend of the model `denoiser`."""
        if self.backend is not None:
            return self.backend
        if not self.is_engine:
            return "onnxruntime"
        return "tensorrt" if self.runtime == "tensorrt" else "python"

    def check(self) -> None:
        """Check what can be checked without the run.

        Raises:
            ServeError: Two options clash, or one is out of range.
        """
        backend = self.chosen_backend
        if backend == "onnxruntime" and self.is_engine:
            raise ServeError(
                f"--backend onnxruntime: target {self.target} is an engine. "
                "Leave --backend out, or serve target ort or portable."
            )
        if backend == "tensorrt" and not self.is_engine:
            raise ServeError(
                f"--backend tensorrt: target {self.target} is no engine. "
                f"Choose --target {' or '.join(ENGINES)}."
            )
        if backend == "tensorrt" and self.runtime == "tensorrt-rtx":
            raise ServeError(
                "--backend tensorrt: Triton's TensorRT backend does not load engines of "
                "TensorRT-RTX. Leave --backend out: the Python backend runs them."
            )
        if self.root is not None:
            if not self.root.is_absolute():
                raise ServeError(f"--root {self.root}: expected an absolute path on the server.")
            check_place(self.root)
        ranges = {
            "--max-batch": (1 if self.max_batch is None else self.max_batch, 1, 4096),
            "--queue-delay-us": (self.queue_delay_us, 0, MOST_DELAY_US),
            "--instances": (self.instances, 1, 64),
            "--concurrency": (self.concurrency, 1, 256),
            "--threads": (1 if self.threads is None else self.threads, 1, 1024),
        }
        for name, (value, low, high) in ranges.items():
            if not low <= value <= high:
                raise ServeError(f"{name}: received {value}, expected {low}..{high}.")


def check_place(root: Path) -> None:
    """Check that a server can serve a repository that lies there.

    Raises:
        ServeError: Triton's Python backend cannot have such a path.
    """
    unfit = find_unfit(root)
    if unfit is not None:
        raise ServeError(f"{unfit} Choose another --out, or name the server's path by --root.")
