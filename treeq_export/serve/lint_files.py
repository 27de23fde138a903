"""Rules about the files of a model: version folders, model files, what these need beside them."""

import re
from collections.abc import Iterator
from pathlib import Path

from treeq_export.errors import ServeError
from treeq_export.reading import read_bytes
from treeq_export.serve.lint_read import Config, Remark, Remarks, number_of_version

_MODEL_FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan", "python": "model.py"}
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_ALMOST_A_VERSION = re.compile(r"0\d+|[vV]\d+")


def model_files(config: Config) -> Iterator[Path]:
    """Yield the model file of every version that is served; it may be missing."""
    message = config.message
    default = message.default_model_filename or _MODEL_FILES.get(config.backend)
    names = sorted(set(message.cc_model_filenames.values())) or ([default] if default else [])
    for version in config.served_versions():
        folder = config.folder.path / str(version)
        if folder.is_dir():
            yield from (folder / name for name in names)


def version_is_there(config: Config) -> Remarks:
    """There is at least one version, as Triton reads the folders' names."""
    folder = config.folder
    served = config.served_versions()
    for name in folder.subfolders:
        number, plain = number_of_version(name), _meant(name)
        if plain is None or plain in folder.subfolders:
            continue
        if number is None:
            does = "ignores it"
        elif number in served:
            does = f"reads it as version {number}, which is not there, and waits for its files"
        else:
            continue  # as harmless as one that does not look like a version
        yield Remark(
            folder.path / name,
            f'received a folder "{name}", expected a plain number: Triton {does}. Rename it to '
            f'"{plain}", or move it elsewhere.',
        )
    if not folder.versions:
        empty = " (an empty one for an ensemble; git keeps no empty folders)"
        yield Remark(
            folder.path,
            f"received no version folder, expected 1/{empty if config.is_ensemble else ''}. "
            "Make it.",
        )


def _meant(name: str) -> str | None:
    """Return the plain number of a folder that Triton, or an operator, takes for a version."""
    number = number_of_version(name)
    if number is not None:
        return str(abs(number))
    return str(int(name.lstrip("vV"))) if _ALMOST_A_VERSION.fullmatch(name) else None


def version_policy(config: Config) -> Remarks:
    """The version policy serves something, and all the versions that it names are there."""
    policy, present = config.message.version_policy, config.folder.versions
    choice = policy.WhichOneof("policy_choice")
    if choice == "latest" and policy.latest.num_versions < 1:
        yield config.remark(
            "version_policy: received latest with num_versions 0, or none, expected 1 or more: "
            "nothing would be served. Write num_versions: 1."
        )
    if choice != "specific":
        return
    wanted = list(policy.specific.versions)
    missing = [version for version in wanted if version not in present]
    if missing or not wanted:
        yield config.remark(
            f"version_policy: received specific versions {wanted}, expected some of {present}: "
            "the server passes over one that is not there. Name versions that are, or add "
            "their folders."
        )


def model_file(config: Config) -> Remarks:
    """Every version that is served has its model file; without it a load may never return."""
    for path in model_files(config):
        if not path.exists():
            yield Remark(
                path,
                "received no such file, expected the model: a load of it fails, or never returns. "
                "Put it there, or name another by default_model_filename.",
            )
        elif path.is_file() and path.stat().st_size == 0:
            yield Remark(path, "received an empty file, expected the model. Copy it again.")
        elif path.is_file() and _is_lfs_pointer(path):
            yield Remark(
                path, "received a pointer of Git LFS, expected the model. Run `git lfs pull`."
            )


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def python_model(config: Config) -> Remarks:
    """A Python model defines, or imports, `TritonPythonModel`."""
    if config.backend != "python":
        return
    for path in model_files(config):
        if path.is_file() and not re.search(rb"TritonPythonModel|import \*", _content(path)):
            yield Remark(
                path,
                "received no TritonPythonModel, expected a class of this name: the backend makes "
                "an instance of it. Name the model's class so.",
            )


def _content(path: Path) -> bytes:
    return read_bytes(path, error=ServeError, remedy="Make it readable.")


def label_file(config: Config) -> Remarks:
    """Files of labels are there."""
    for tensor in config.message.output:
        path = config.folder.path / tensor.label_filename
        if tensor.label_filename and not path.is_file():
            yield config.remark(
                f'output "{tensor.name}": received label_filename "{tensor.label_filename}", '
                "which is not there, expected a file in the model's folder. Put it there, or "
                "remove label_filename."
            )
