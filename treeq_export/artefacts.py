"""Writing files so that a reader sees the old file, the new file, or none; never half of one.

A file is written under a temporary name in the same folder, flushed to the disk and renamed.
What a killed process left behind under such a name is removed by the next `remove_stale`.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from treeq_export.errors import OutputError, TreeqError

_TEMPORARY = ".partial"
_FILE_MODE = 0o644  # some writers create files that only their owner can read
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors words an OSError


def _output_error(path: Path, error: OSError) -> OutputError:
    """Return the one-line error for a failed write to `path`."""
    again = "or choose another --out, then run the same command again."
    if error.errno == errno.ENOSPC:
        free = shutil.disk_usage(_nearest_folder(path)).free
        return OutputError(
            f"{path}: the disk is full ({free / 1e6:.1f} MB free). Free some space {again}"
        )
    if error.errno == errno.EDQUOT:
        return OutputError(f"{path}: the disk quota is used up. Free some space {again}")
    if error.errno == errno.EFBIG:
        return OutputError(
            f"{path}: larger than `ulimit -f` or the file system allows. Raise the limit {again}"
        )
    reason = os.strerror(error.errno) if error.errno else str(error)
    return OutputError(f"{path}: cannot be written ({reason}). Choose another --out folder.")


def _os_error_in(error: Exception) -> OSError | None:
    """Return the operating system's error that `error` is, or that a Rust library has wrapped."""
    if isinstance(error, OSError):
        return error
    wrapped = None if isinstance(error, TreeqError) else _RUST_OS_ERROR.search(str(error))
    return None if wrapped is None else OSError(int(wrapped[1]), str(error))


def _nearest_folder(path: Path) -> Path:
    """Return the nearest existing ancestor of `path`."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def make_folder(path: Path) -> Path:
    """Create a folder with its parents.

    Args:
        path: The folder; it may exist.

    Returns:
        The same path.

    Raises:
        OutputError: The folder cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}{_TEMPORARY}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _output_error(path, error) from error
    return path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` and rename it to `path` when the block succeeds.

    Args:
        path: The final file name; its folder is created.

    Yields:
        A path in the same folder and with the same suffix, not existing yet.

    Raises:
        OutputError: The disk is full or the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{_TEMPORARY}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(_FILE_MODE)
        temporary.replace(path)
    except Exception as error:
        failed_write = _os_error_in(error)
        if failed_write is None:
            raise
        raise _output_error(path, failed_write) from error
    finally:
        with suppress(OSError):  # there may be no such folder
            temporary.unlink()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that takes the place of `path` when the block succeeds.

    Args:
        path: The final folder; an existing one is replaced as a whole.

    Yields:
        The temporary folder, in the same parent.

    Raises:
        OutputError: The disk is full or the parent cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    old = path.with_name(f".{path.name}.{os.getpid()}.old{_TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        if path.exists():  # renamed, since a kill while it is removed would leave half of it
            path.replace(old)
        temporary.replace(path)
    except Exception as error:
        failed_write = _os_error_in(error)
        if failed_write is None:
            raise
        raise _output_error(path, failed_write) from error
    finally:
        if old.exists() and not path.exists():
            old.replace(path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically.

    Raises:
        OutputError: The disk is full or the folder cannot be written to.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically.

    Raises:
        OutputError: The disk is full or the folder cannot be written to.
    """
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def remove_stale(folder: Path) -> list[Path]:
    """Remove what killed processes left under temporary names below `folder`.

    Returns:
        The removed paths.
    """
    stale = sorted(folder.rglob(f".*{_TEMPORARY}*"))
    for path in stale:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return stale


def sha256_of_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
