"""manifest.json of a Triton repository: what it is, and where it may be started."""

from typing import Literal

from treeq_export.records.base import Record


class ServedFile(Record):
    """A file of the repository."""

    bytes: int
    sha256: str


class ServeManifest(Record):
    """What a repository is; checked before the server starts and when a model is loaded.

    Attributes:
        format_version: Version of this file's format.
        treeq_version: Version of the package that wrote the repository.
        name: The run's name.
        plan_sha256: Digest of the plan, by version.
        target: Compiled target.
        mode: Mode of the sampler.
        backend: What runs the model `denoiser`.
        backend_version: Version of the runtime that it was written for.
        root: Folder in which the repository has to lie, if a library is named by its absolute path.
        gpu: What the engine was built for.
        denoiser: Profile of the denoiser.
        models: Versions by model.
        packages: Python packages by model; major and minor version have to be these.
        files: By name, relative to the repository.
        pending: A version whose folders are being written; the server loads none of them.
    """

    class Denoiser(Record):
        """Batch sizes "min", "opt" and "max"."""

        profile: dict[str, int]

    format_version: Literal[1] = 1
    treeq_version: str
    name: str
    plan_sha256: dict[str, str]
    target: str
    mode: str
    backend: str
    backend_version: str
    root: str | None
    gpu: str | None
    denoiser: Denoiser
    models: dict[str, list[int]]
    packages: dict[str, dict[str, str]]
    files: dict[str, ServedFile]
    pending: int | None = None
