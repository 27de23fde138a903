"""What lint looks at: the folders of a model repository and their parsed configurations.

A configuration is parsed by Triton's own protobuf schema, as the server does. It is parsed twice:
the second time with every map as the list of entries that stand in the file, since a map keeps
only the last of two entries with one key, without a word.

Version folders are numbered as Triton 2.51 does (tried with the server): a name is read like C's
`stoll`, so that "2.bak" is version 2, and names with leading zeros are ignored.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from treeq_export.errors import ServeError
from treeq_export.reading import read_record, read_text
from treeq_export.serve.inside.settings import DENOISER as DENOISER
from treeq_export.serve.inside.settings import SAMPLER as SAMPLER
from treeq_export.serve.inside.settings import VAE_DECODER as VAE_DECODER

MAIN = "config.pbtxt"
CPU = "cpu"  # the variant for machines without a GPU
BACKEND_OF_PLATFORM = {
    "onnxruntime_onnx": "onnxruntime",
    "tensorrt_plan": "tensorrt",
    "pytorch_libtorch": "pytorch",
    "libtorch": "pytorch",
    "torch_aoti": "pytorch",
    "tensorflow_graphdef": "tensorflow",
    "tensorflow_savedmodel": "tensorflow",
    "ensemble": "",
}
_NO_VERSIONS = ("configs", "warmup", "initial_state")
_LEADING_NUMBER = re.compile(r"\s*[+-]?\d+")


class Remark(NamedTuple):
    """What a rule has to say about a file, or a folder."""

    path: Path
    text: str


Remarks = Iterator[Remark]


class Profile(BaseModel):
    """Batch sizes that the denoiser was built for; from manifest.json."""

    min: int
    opt: int
    max: int


class _Denoiser(BaseModel):
    profile: Profile | None = None


class _Manifest(BaseModel):
    """What lint compares with; the rest of manifest.json may be of any version."""

    denoiser: _Denoiser | None = None


@dataclass(eq=False)
class Config:
    """A config.pbtxt or configs/*.pbtxt that the schema accepts.

    Attributes:
        path: The file.
        folder: The model it configures.
        message: An `inference.ModelConfig`.
        listed: The same with maps as lists of entries.
    """

    path: Path
    folder: "ModelFolder"
    message: Any
    listed: Any

    @property
    def variant(self) -> str:
        """What `--model-config-name` has to say for this file; empty for config.pbtxt."""
        return self.path.stem if self.path.parent.name == "configs" else ""

    @property
    def backend(self) -> str:
        """The backend that runs the model; empty for an ensemble and where nothing names one."""
        return self.message.backend or BACKEND_OF_PLATFORM.get(self.message.platform, "")

    @property
    def is_ensemble(self) -> bool:
        """Whether other models do the work."""
        return self.message.platform == "ensemble" or self.message.HasField("ensemble_scheduling")

    @property
    def is_sampler(self) -> bool:
        """Whether this is the model that runs the sampling loop."""
        return self.folder.name == SAMPLER or "treeq_mode" in self.message.parameters

    def parameter(self, key: str) -> str | None:
        """Return a parameter's string; None where there is no such parameter."""
        parameters = self.message.parameters  # reading a missing key of a protobuf map adds it
        return parameters[key].string_value if key in parameters else None

    def sibling(self, name: str) -> "Config | None":
        """Return the configuration that the server uses for another model, together with this."""
        folder = self.folder.repository.folders.get(name)
        return None if folder is None else folder.config(self.variant)

    def served_versions(self) -> list[int]:
        """Return the versions that the server loads under the version policy."""
        policy, present = self.message.version_policy, self.folder.versions
        choice = policy.WhichOneof("policy_choice")
        if choice == "specific":
            return [version for version in present if version in policy.specific.versions]
        if choice == "all":
            return present
        return present[: policy.latest.num_versions if choice == "latest" else 1]

    def remark(self, text: str) -> Remark:
        """Return a remark about this file."""
        return Remark(self.path, text)


@dataclass(eq=False)
class ModelFolder:
    """A folder of the repository's root: one model.

    Attributes:
        path: The folder.
        repository: Where it is.
        configs: The configurations that could be parsed, config.pbtxt first.
        unread: The others, each with what is wrong.
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

    @cached_property
    def subfolders(self) -> list[str]:
        """Names of the folders that Triton takes for versions, or ignores."""
        return sorted(
            path.name
            for path in self.path.iterdir()
            if path.is_dir() and path.name not in _NO_VERSIONS
        )

    @cached_property
    def versions(self) -> list[int]:
        """The versions as Triton numbers them, newest first; the folder of one may be missing."""
        numbers = map(number_of_version, self.subfolders)
        return sorted({number for number in numbers if number is not None}, reverse=True)


@dataclass(eq=False)
class Repository:
    """A model repository.

    Attributes:
        root: Its folder, absolute.
        final_root: Where it will be; absolute paths below it are looked up below `root`.
        folders: Models by name.
        strangers: Folders that are no models.
        profile: From manifest.json; None where there is none, or none in it.
        manifest_error: What is wrong with manifest.json; empty if nothing is.
        graphs: ONNX graphs by file, read once.
    """

    root: Path
    final_root: Path
    folders: dict[str, ModelFolder] = field(default_factory=dict[str, ModelFolder])
    strangers: list[Path] = field(default_factory=list[Path])
    profile: Profile | None = None
    manifest_error: str = ""
    graphs: dict[Path, Any] = field(default_factory=dict[Path, Any])

    def locate(self, path: str) -> Path:
        """Return where an absolute path of a configuration is now."""
        given = Path(path)
        if given.is_relative_to(self.final_root):
            return self.root / given.relative_to(self.final_root)
        return given


def number_of_version(name: str) -> int | None:
    """Return the version that Triton reads from a folder's name; None if it ignores the folder."""
    number = _LEADING_NUMBER.match(name)
    if number is None or (len(name) > 1 and name.startswith("0")):
        return None
    return int(number[0])


def enum_name(message: Any, name: str) -> str:
    """Return the name of an enumeration field's value; its number where it has none."""
    number = getattr(message, name)
    value = message.DESCRIPTOR.fields_by_name[name].enum_type.values_by_number.get(number)
    return str(number) if value is None else value.name


def shape_of(tensor: Any) -> list[int]:
    """Return a tensor's shape as the backend sees it, without the batch axis."""
    return list(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)


def count_models(root: Path) -> int:
    """Return the number of models in a repository."""
    return sum((path / MAIN).is_file() for path in root.iterdir())


def read_repository(root: Path, final_root: Path | None = None) -> Repository:
    """Read a repository's configurations.

    Args:
        root: Its folder.
        final_root: See `Repository`; `root` itself where None.

    Returns:
        The repository, with what could not be read named in it.

    Raises:
        ServeError: No such folder, no model in it, or tritonclient is missing.
    """
    root = root.absolute()
    if not root.is_dir():
        raise ServeError(f"{root}: no such folder. Name the folder that holds the models' folders.")
    parse = _load_parser()
    repository = Repository(root, (final_root or root).absolute())
    for path in sorted(path for path in root.iterdir() if path.is_dir()):
        folder = ModelFolder(path, repository)
        files = [path / MAIN, *sorted((path / "configs").glob("*.pbtxt"))]
        files = [file for file in files if file.is_file()]
        if not files and not folder.versions:
            repository.strangers.append(path)
            continue
        repository.folders[path.name] = folder
        for file in files:
            parse(file, folder)
    if not repository.folders:
        raise ServeError(
            f"{root}: received no folder with a {MAIN}, expected one per model. "
            "Name the folder that holds the models' folders."
        )
    _read_manifest(repository)
    return repository


def _load_parser() -> Any:
    """Return a function: file, folder -> adds the file's configuration, or what is wrong."""
    try:
        schema: Any = import_module("tritonclient.grpc.model_config_pb2")
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
    except ImportError as error:
        raise ServeError(
            f"tritonclient: not installed ({error}). `pip install 'treeq-export[serve]'` has it."
        ) from error
    file_schema = descriptor_pb2.FileDescriptorProto.FromString(schema.DESCRIPTOR.serialized_pb)
    _list_maps(file_schema.message_type)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file_schema)
    listed_class: Any = message_factory.GetMessageClass(
        pool.FindMessageTypeByName("inference.ModelConfig")
    )

    def parse(path: Path, folder: ModelFolder) -> None:
        try:
            text = read_text(path, error=ServeError, remedy="Write it as UTF-8.")
            message = text_format.Parse(text, schema.ModelConfig())
            listed = text_format.Parse(text, listed_class())
        except ServeError as error:
            folder.unread.append(Remark(path, str(error).removeprefix(f"{path}: ")))
        except text_format.ParseError as error:
            place = f"line {error.GetLine()}, column {error.GetColumn()}"
            folder.unread.append(Remark(path, f"{place}: {_problem(error)}"))
        else:
            folder.configs.append(Config(path, folder, message, listed))

    return parse


def _problem(error: Exception) -> str:
    """Return a parse error without the place, as one sentence."""
    text = " ".join(re.sub(r"^\d+:\d+ : ", "", str(error)).split())
    return text if text.endswith(".") else f"{text}."


def _list_maps(messages: Any) -> None:
    for message in messages:
        message.options.ClearField("map_entry")
        _list_maps(message.nested_type)


def _read_manifest(repository: Repository) -> None:
    path = repository.root / "manifest.json"
    if not path.is_file():
        return
    try:
        denoiser = read_record(path, _Manifest, error=ServeError, remedy="").denoiser
    except ServeError as error:
        repository.manifest_error = str(error).removeprefix(f"{path}: ").strip()
        return
    if denoiser is None or denoiser.profile is None:
        return
    sizes = denoiser.profile
    if 1 <= sizes.min <= sizes.opt <= sizes.max:
        repository.profile = sizes
    else:
        repository.manifest_error = (
            f"denoiser.profile: received min {sizes.min}, opt {sizes.opt}, max {sizes.max}, "
            "expected 1 <= min <= opt <= max."
        )
