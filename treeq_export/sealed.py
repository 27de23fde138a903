"""Files that carry the digest of their own content: what is damaged is noticed, and made again.

Whatever a stage keeps to go on from is such a file, labelled with the fingerprint of all that it
depends on: a search's inputs and weights, the state of a training, samples. What finished stages
left stands in run.json.

A sealed safetensors file has "sha256" among its metadata: the SHA-256 of all its bytes with 64
zeros in the digest's place. A sealed JSON object has the key "sha256": the SHA-256 of the canonical
text of its other keys.
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from treeq_export.artefacts import atomic_path, digest_of, write_json
from treeq_export.errors import OutputError, TreeqError
from treeq_export.progress import Say, say_nothing
from treeq_export.reading import parse_json, read_object

SEAL, FINGERPRINT = "sha256", "fingerprint"
_BLANK = b"0" * 64
_SEAL_IN_HEADER = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_SIZE_FIELD = 8  # bytes before the header of a safetensors file
_MAX_HEADER_BYTES = 100_000_000
_BLOCK_BYTES = 1 << 20


def write_sealed_tensors(
    path: Path,
    save_file: Callable[..., Any],
    tensors: Mapping[str, Any],
    fingerprint: str,
    **metadata: str,
) -> None:
    """Write a sealed safetensors file, atomically.

    Args:
        path: The file.
        save_file: `save_file` of safetensors for the framework of the tensors.
        tensors: By name, contiguous.
        fingerprint: Digest of all that the tensors depend on.
        **metadata: More that `read_sealed_metadata` is to return.

    Raises:
        OutputError: The disk is full or the folder cannot be written to.
    """
    with atomic_path(path) as temporary:
        labels = {FINGERPRINT: fingerprint, **metadata, SEAL: _BLANK.decode()}
        save_file(dict(tensors), temporary, metadata=labels)
        header = _read_header(temporary)
        found = _SEAL_IN_HEADER.search(header)
        assert found is not None
        digest = _digest_file(temporary, header)
        with temporary.open("rb+") as file:
            file.seek(_SIZE_FIELD + found.start(1))
            file.write(digest.encode())


def read_sealed_metadata(
    path: Path, fingerprint: str, say: Say = say_nothing
) -> dict[str, str] | None:
    """Return the metadata of a sealed safetensors file, if it can be used.

    Args:
        path: The file; it may be missing.
        fingerprint: Fingerprint that it must have.
        say: Told in one line that the file is damaged.

    Returns:
        All its metadata; None where it is missing, damaged, or something else than expected.
    """
    if not os.path.lexists(path):
        return None
    metadata = _read_whole(path)
    if metadata is None:
        say(f"{path}: damaged, or of an older treeq-export; it is made again.")
        return None
    return metadata if metadata.get(FINGERPRINT) == fingerprint else None


def _read_whole(path: Path) -> dict[str, str] | None:
    """Return a file's metadata; None where it cannot be read or is not what was written."""
    try:
        header = _read_header(path)
        found = _SEAL_IN_HEADER.search(header)
        if found is None or _digest_file(path, header) != found[1].decode():
            return None
        return parse_json(header, path, error=OutputError, remedy="")["__metadata__"]
    except (OSError, ValueError, LookupError, TypeError, TreeqError):
        return None


def _read_header(path: Path) -> bytes:
    """Return the header of a safetensors file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is too short.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(_SIZE_FIELD), "little")
        header = file.read(size) if size <= _MAX_HEADER_BYTES else b""
    if len(header) != size:
        raise ValueError("cut short")
    return header


def _digest_file(path: Path, header: bytes) -> str:
    """Return the digest of a safetensors file with zeros in the place of its seal."""
    digest = hashlib.sha256(len(header).to_bytes(_SIZE_FIELD, "little"))
    blank = rb'"sha256":"' + _BLANK + b'"'
    digest.update(_SEAL_IN_HEADER.sub(lambda _: blank, header, count=1))
    with path.open("rb") as file:
        file.seek(_SIZE_FIELD + len(header))
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its seal in the place of an old one."""
    content = {name: item for name, item in value.items() if name != SEAL}
    return {**content, SEAL: digest_of(**content)}


def is_sealed(value: Mapping[str, Any]) -> bool:
    """Whether a JSON object is as it was sealed."""
    return value.get(SEAL) == seal(value)[SEAL]


def write_sealed_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a sealed JSON object, atomically.

    Raises:
        OutputError: The disk is full or the folder cannot be written to.
    """
    write_json(path, seal(value))


def read_sealed_json(path: Path, say: Say = say_nothing) -> dict[str, Any] | None:
    """Return a sealed JSON object without its seal.

    Args:
        path: The file; it may be missing.
        say: Told in one line that the file is damaged.

    Returns:
        The object; None where the file is missing or damaged.
    """
    if not os.path.lexists(path):
        return None
    try:
        value = read_object(path, error=OutputError, remedy="")
    except TreeqError:
        value = {}
    if not is_sealed(value):
        say(f"{path}: damaged, or of an older treeq-export; it is made again.")
        return None
    return {name: item for name, item in value.items() if name != SEAL}
