"""What lint looks at: the folders of a model repository and their parsed configurations."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from treeq_export.errors import ServeError
from treeq_export.reading import read_json, read_record, read_text
from treeq_export.records.serve import ServeManifest
from treeq_export.serve.others import MANIFEST_FILE
from treeq_served.settings import DENOISER, SAMPLER, VAE_DECODER

MAIN = "config.pbtxt"
OWN_MODELS = (DENOISER, SAMPLER, VAE_DECODER)
_BACKEND_OF_PLATFORM = {"onnxruntime_onnx": "onnxruntime", "tensorrt_plan": "tensorrt"}
_MODEL_FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan", "python": "model.py"}


class Remark(NamedTuple):
    """One sentence of a rule about a file, or a folder."""

    path: Path
    text: str


Remarks = Iterator[Remark]


@dataclass(eq=False)
class Config:
    """A config.pbtxt or configs/*.pbtxt that the schema accepts.

    Attributes:
        path: The file.
        folder: The model it configures.
        message: An `inference.ModelConfig`.
    """

    path: Path
    folder: "ModelFolder"
    message: Any

    @property
    def variant(self) -> str:
        """The value of `--model-config-name` for this file; empty for config.pbtxt."""
        return self.path.stem if self.path.parent.name == "configs" else ""

    @property
    def backend(self) -> str:
        """The backend that runs the model; empty where nothing names one."""
        return self.message.backend or _BACKEND_OF_PLATFORM.get(self.message.platform, "")

    def tensors(self, kind: str) -> dict[str, Any]:
        """Return the tensors of "input" or "output" by name."""
        return {tensor.name: tensor for tensor in getattr(self.message, kind)}

    def parameter(self, key: str) -> str | None:
        """Return a parameter's string; None where there is no such parameter."""
        parameters = self.message.parameters  # reading a missing key of a protobuf map adds it
        return parameters[key].string_value if key in parameters else None

    def sibling(self, name: str) -> "Config | None":
        """Return the configuration that the server uses for another model, together with this."""
        folder = self.folder.repository.folders.get(name)
        return None if folder is None else folder.config(self.variant)

    @property
    def model_file(self) -> Path | None:
        """The file of the version that is served, the latest; it may be missing."""
        name, versions = _MODEL_FILES.get(self.backend), self.folder.versions
        return self.folder.path / str(versions[-1]) / name if name and versions else None

    def remark(self, text: str) -> Remark:
        """Return a remark about this file."""
        return Remark(self.path, text)


@dataclass(eq=False)
class ModelFolder:
    """A folder of the repository's root: one model.

    Attributes:
        path: The folder.
        repository: The repository it belongs to.
        configs: The configurations that could be parsed, config.pbtxt first.
        unread: The configurations that could not be parsed, each with the reason.
    """

    path: Path
    repository: "Repository"
    configs: list[Config] = field(default_factory=list[Config])
    unread: list[Remark] = field(default_factory=list[Remark])

    @property
    def name(self) -> str:
        """The model's name."""
        return self.path.name

    def config(self, variant: str) -> Config | None:
        """Return a variant's configuration, or config.pbtxt where there is none of that name."""
        by_variant = {config.variant: config for config in self.configs}
        return by_variant.get(variant, by_variant.get(""))

    @property
    def versions(self) -> list[int]:
        """The versions, newest last."""
        folders = (path for path in self.path.iterdir() if path.is_dir())
        return sorted(int(path.name) for path in folders if path.name.isdecimal())


@dataclass(eq=False)
class Repository:
    """A model repository.

    Attributes:
        root: Absolute path of the folder.
        final_root: Place on the server; absolute paths below it are looked up below `root`.
        folders: Models by name.
        manifest: The content of manifest.json; None where there is none of ours.
        manifest_error: The fault of manifest.json; empty if there is none.
        graphs: ONNX graphs by file, read once.
    """

    root: Path
    final_root: Path
    folders: dict[str, ModelFolder] = field(default_factory=dict[str, ModelFolder])
    manifest: ServeManifest | None = None
    manifest_error: str = ""
    graphs: dict[Path, Any] = field(default_factory=dict[Path, Any])

    @property
    def profile(self) -> dict[str, int]:
        """Batch sizes "min", "opt" and "max" of the denoiser; empty without a manifest."""
        return {} if self.manifest is None else self.manifest.denoiser.profile

    @property
    def own_models(self) -> list[ModelFolder]:
        """The models that `serve` writes."""
        return [folder for name, folder in self.folders.items() if name in OWN_MODELS]

    def locate(self, path: str) -> Path:
        """Return where an absolute path of a configuration is now."""
        given = Path(path)
        if given.is_relative_to(self.final_root):
            return self.root / given.relative_to(self.final_root)
        return given


def enum_name(message: Any, name: str) -> str:
    """Return the name of an enumeration field's value; its number where it has none."""
    number = getattr(message, name)
    value = message.DESCRIPTOR.fields_by_name[name].enum_type.values_by_number.get(number)
    return str(number) if value is None else value.name


def is_file(path: Path) -> bool:
    """Whether a file exists; a name that no file system takes is that of none."""
    try:
        return path.is_file()
    except OSError:
        return False


def count_models(root: Path) -> int:
    """Return the number of models in a repository."""
    return sum((path / MAIN).is_file() for path in root.iterdir())


def read_repository(root: Path, final_root: Path | None = None) -> Repository:
    """Read a repository's configurations.

    Args:
        root: The repository's folder.
        final_root: See `Repository`; `root` itself where None.

    Returns:
        The repository, with what could not be read named in it.

    Raises:
        ServeError: The folder does not exist or has no model, or tritonclient is missing.
    """
    root = root.absolute()
    if not root.is_dir():
        raise ServeError(f"{root}: no such folder. Name the folder that holds the models' folders.")
    try:
        schema: Any = import_module("tritonclient.grpc.model_config_pb2")
    except ImportError as error:
        raise ServeError(
            f"tritonclient: not installed ({error}). `pip install 'treeq-export[serve]'` has it."
        ) from error
    repository = Repository(root, (final_root or root).absolute())
    for path in sorted(path for path in root.iterdir() if path.is_dir()):
        folder = ModelFolder(path, repository)
        files = [path / MAIN, *sorted((path / "configs").glob("*.pbtxt"))]
        files = [file for file in files if file.is_file()]
        if files or folder.versions:
            repository.folders[path.name] = folder
        for file in files:
            _parse(file, folder, schema.ModelConfig())
    if not repository.folders:
        raise ServeError(
            f"{root}: received no folder with a {MAIN}, expected one per model. "
            "Name the folder that holds the models' folders."
        )
    _read_manifest(repository)
    return repository


def _parse(path: Path, folder: ModelFolder, message: Any) -> None:
    """Add a file's configuration to its model, or the fault that was found."""
    from google.protobuf import text_format

    try:
        text = read_text(path, error=ServeError, remedy="Write it as UTF-8.")
        text_format.Parse(text, message)
    except ServeError as error:
        folder.unread.append(Remark(path, str(error).removeprefix(f"{path}: ")))
    except text_format.ParseError as error:
        problem = " ".join(re.sub(r"^\d+:\d+ : ", "", str(error)).split()).removesuffix(".")
        place = f"line {error.GetLine()}, column {error.GetColumn()}"
        folder.unread.append(Remark(path, f"{place}: {problem}."))
    else:
        folder.configs.append(Config(path, folder, message))


def _read_manifest(repository: Repository) -> None:
    """Read manifest.json; one without "treeq_version" is of another program."""
    path = repository.root / MANIFEST_FILE
    if not path.is_file():
        return
    try:
        content = read_json(path, error=ServeError, remedy="")
        if isinstance(content, dict) and "treeq_version" in content:
            repository.manifest = read_record(path, ServeManifest, error=ServeError, remedy="")
    except ServeError as error:
        repository.manifest_error = str(error).removeprefix(f"{path}: ").strip()
