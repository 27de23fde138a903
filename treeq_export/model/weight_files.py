"""Which files of a checkpoint hold the configuration and the weights, and what others are.

Accepted beside config.json, in this order: diffusion_pytorch_model.safetensors, its sharded index,
the older `.bin` of both, and the same under the name pytorch_model. A `variant` such as fp16 stands
before the suffix (diffusion_pytorch_model.fp16.safetensors) or before an index's .json.
"""

import errno
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from treeq_export.errors import CheckpointError
from treeq_export.model.families import FAMILIES
from treeq_export.reading import TensorFile, open_safetensors, read_object, read_text

_MAX_FILE_NAME = 255  # bytes, of common file systems
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
_STEMS = ("diffusion_pytorch_model", "pytorch_model")
_WEIGHTS = re.compile(
    rf"(?P<stem>{'|'.join(_STEMS)})(\.(?P<before>[^.]+))?\.(?P<kind>safetensors|bin)"
    r"(?P<index>\.index(\.(?P<behind>[^.]+))?\.json)?"
)
_SHARD = re.compile(r"-\d+-of-\d+$")
_MODEL_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".sft")
_LORA = re.compile(r"(^|[._])lora([._]|$)|\.(hada|lokr)_", re.IGNORECASE)
AGAIN = "Download the file again."
LORA = (
    "a LoRA adapter. Fuse it into its base model: pipe.load_lora_weights(...), pipe.fuse_lora(), "
    "pipe.transformer.save_pretrained(FOLDER)."
)
_PREFIX = "model.diffusion_model."  # which ComfyUI puts before the original names


@dataclass(frozen=True)
class _Found:
    """A file with weights, or the index of such files."""

    path: Path
    variant: str | None
    rank: tuple[bool, bool, bool]
    is_index: bool


def model_folder(path: Path) -> Path | None:
    """Return the folder that holds the model's configuration; None where there is none.

    Args:
        path: That folder, a pipeline's with `transformer/` in it, or the root of a repository in
            the Hugging Face cache (`models--org--name`), whose main revision is taken.
    """
    path = _snapshot(path)
    for folder in (path, path / "transformer"):
        if (folder / CONFIG_FILE).is_file():
            return folder
    return None


def _snapshot(path: Path) -> Path:
    """Return the revision of a repository in the cache: that of refs/main, or the only one."""
    if (path / CONFIG_FILE).exists() or not (path / "snapshots").is_dir():
        return path
    main = path / "refs" / "main"
    if main.is_file():
        name = read_text(main, error=CheckpointError, remedy="Give one folder of snapshots/.")
        return path / "snapshots" / name.strip()
    snapshots = sorted((path / "snapshots").iterdir())
    return snapshots[0] if len(snapshots) == 1 else path


def model_name(path: Path) -> str:
    """Return what a checkpoint is called: its folder, file stem, or repository in the cache.

    >>> model_name(Path("/hub/models--org--DiT-XL/snapshots/0123456/transformer"))
    'DiT-XL'
    """
    absolute = path.absolute()
    if path.is_file():
        return absolute.stem
    folder = absolute.parent if absolute.name == "transformer" else absolute
    if folder.parent.name == "snapshots":
        folder = folder.parent.parent
    repository = folder.name.startswith("models--")
    return folder.name.split("--")[-1] if repository else folder.name


def find_weights(folder: Path, variant: str | None) -> tuple[tuple[Path, ...], str | None]:
    """Return the weight files in name order, and their variant where it was not asked for.

    Args:
        folder: The folder of config.json.
        variant: Variant such as "fp16"; None takes the files without one, or the only variant.

    Raises:
        CheckpointError: There are none, more than one variant, or a shard is missing.
    """
    found = _list_weights(folder)
    variants = sorted({file.variant for file in found if file.variant is not None})
    chosen = variant
    if variant is None and all(file.variant is not None for file in found):
        if len(variants) > 1:
            raise CheckpointError(
                f"{folder}: weights in the variants {', '.join(variants)}. "
                "Choose one with model.variant, or leave one there."
            )
        chosen = variants[0] if variants else None
    fitting = [file for file in found if file.variant == chosen]
    if not fitting:
        if variant is not None and found:
            there = ", ".join(file.path.name for file in found)
            raise CheckpointError(
                f"{folder}: no weights of variant {variant}; there is {there}. "
                "Correct model.variant, or remove it."
            )
        raise CheckpointError(f"{folder}: no weights. {_what_is_there(folder)}")
    first = min(fitting, key=lambda file: file.rank)
    files = _read_index(first.path) if first.is_index else (first.path,)
    return files, chosen if variant is None else None


def _list_weights(folder: Path) -> list[_Found]:
    found = []
    for path in sorted(folder.iterdir()):
        match = _WEIGHTS.fullmatch(path.name)
        if match is None or _SHARD.search(match["before"] or ""):
            continue
        if path.is_symlink() and not path.exists():
            raise CheckpointError(
                f"{path}: a link to {path.readlink()}, which is not there. Download it again."
            )
        is_index = match["index"] is not None
        rank = (match["kind"] == "bin", match["stem"] != _STEMS[0], is_index)
        found.append(_Found(path, match["before"] or match["behind"], rank, is_index))
    return found


def _what_is_there(folder: Path) -> str:
    others = [path for path in sorted(folder.iterdir()) if path.suffix in _MODEL_SUFFIXES]
    if not others:
        return (
            f"Expected {WEIGHTS_FILE} (or {INDEX_FILE} and its shards) beside {CONFIG_FILE}; "
            "download it too."
        )
    return f"Expected {WEIGHTS_FILE}; there is {others[0].name}: {explain_file(others[0])}"


def _read_index(index: Path) -> tuple[Path, ...]:
    """Return the shards in name order; each must exist beside the index."""
    shards = read_object(index, error=CheckpointError, remedy=AGAIN).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index}: no weight_map. Download the file again.")
    long = next((s for s in shards.values() if len(str(s).encode()) > _MAX_FILE_NAME), None)
    if long is not None:
        raise CheckpointError(
            f"{index}: weight_map: received a name of {len(str(long))} characters, which no file "
            "has. Download the file again."
        )
    files = tuple(index.parent / name for name in sorted({str(s) for s in shards.values()}))
    for file in files:
        if not file.is_file() or file.parent != index.parent:
            raise CheckpointError(
                f"{file}: missing, but named by {index.name}. "
                f"Download this shard into {index.parent}."
            )
    return files


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a file that the operating system does not let us read."""
    denied = error.errno in (errno.EACCES, errno.EPERM)
    remedy = "Give this user permission to read it" if denied else "Check the path and the disk"
    return CheckpointError(f"{path}: cannot be read ({error.strerror}). {remedy}.")


def open_weights(file: Path) -> AbstractContextManager[TensorFile]:
    """Open a safetensors file.

    Raises:
        CheckpointError: It cannot be read, is truncated or damaged.
    """
    try:
        with file.open("rb"):
            pass
    except OSError as error:
        raise unreadable(file, error) from error
    return open_safetensors(
        file, error=CheckpointError, remedy="Download it again.", framework="pt"
    )


def explain_file(file: Path) -> str:
    """Say what a single file is and what makes a checkpoint of it, in one sentence or two."""
    if file.suffix == ".gguf":
        return "it is quantized already. Use the checkpoint before quantization."
    if file.suffix == ".safetensors":
        with open_weights(file) as reader:
            explained = explain_names(reader.header, file)
        if explained is not None:
            return explained
        if (file.parent / CONFIG_FILE).is_file() and file.name == WEIGHTS_FILE:
            return "Give the folder that it lies in."
    return (
        f"Give a folder that diffusers' save_pretrained wrote, with {CONFIG_FILE} and "
        f"{WEIGHTS_FILE}."
    )


def explain_names(names: Iterable[str], file: Path) -> str | None:
    """Say what tensors of these names are where they are no diffusers model; None if they may be.

    Args:
        names: Names of tensors.
        file: The file that holds them.
    """
    names = list(names)
    if names and all(_LORA.search(name) or name.endswith(".alpha") for name in names):
        return f"it is {LORA}"
    classes = [
        family.diffusers_class
        for family in FAMILIES
        if family.original_name is not None and any(map(family.original_name.search, names))
    ]
    prefixed = bool(names) and all(name.startswith(_PREFIX) for name in names)
    if not classes and not prefixed:
        return None
    layout = f"with names that begin with {_PREFIX} (ComfyUI)" if prefixed else "of original names"
    return (
        f"it is a single-file checkpoint {layout}. Convert it once: "
        f'diffusers.{classes[0] if classes else "CLASS"}.from_single_file("{file.name}")'
        '.save_pretrained("FOLDER").'
    )


def is_lora(name: str) -> bool:
    """Whether a tensor belongs to a LoRA adapter, by its name."""
    return _LORA.search(name) is not None
