"""Writing files so that a reader sees the old file, the new file, or none; never half of one.

A file or folder is made in a workplace, a folder of ours beside its place, and renamed:

    .treeq-<process>-<random>.partial/<name>

The workplace is locked while its process lives, and the kernel frees the lock on a kill. Whoever
writes into the same folder next removes workplaces that are not locked, and nothing else.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from treeq_export.errors import OutputError, TreeqError

_WORKPLACE = re.compile(r"\.treeq-\d+-\w+\.partial")
_REPLACED = ".replaced"  # in a workplace: what has to go back if its process was killed
_FILE_MODE = 0o644  # some writers create files that only their owner can read
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors words an OSError
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of renameat2(2)
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
OTHER_OUT = "Choose another --out folder."


def _output_error(path: Path, error: OSError, remedy: str = OTHER_OUT) -> OutputError:
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
    return OutputError(f"{path}: cannot be written ({reason}). {remedy}")


def _os_error_in(error: Exception) -> OSError | None:
    """Return the operating system's error that `error` is, or that a Rust library has wrapped."""
    if isinstance(error, OSError):
        return error
    wrapped = None if isinstance(error, TreeqError) else _RUST_OS_ERROR.search(str(error))
    return None if wrapped is None else OSError(int(wrapped[1]), str(error))


def _nearest_folder(path: Path) -> Path:
    """Return the nearest existing ancestor of `path`."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def make_folder(path: Path, remedy: str = OTHER_OUT) -> Path:
    """Create a folder with its parents.

    Args:
        path: The folder; it may exist.
        remedy: Advice for the case that it cannot be, as a sentence.

    Returns:
        The same path.

    Raises:
        OutputError: The folder cannot be created or written to.
    """
    try:
        with _workplace(path):
            return path
    except OSError as error:
        raise _output_error(path, error, remedy) from error


@contextmanager
def _workplace(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent`, which is created; the folder is gone afterwards.

    Stale ones are removed first.
    """
    parent.mkdir(parents=True, exist_ok=True)
    remove_stale(parent)
    while True:
        name = tempfile.mkdtemp(prefix=f".treeq-{os.getpid()}-", suffix=".partial", dir=parent)
        folder = Path(name)
        lock = _lock(folder)
        if lock is not None:
            break  # else another process took it for stale before it was locked
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a workplace; return the file descriptor that holds the lock, None where one does.

    A file system without locks gives a descriptor as well.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        return descriptor
    with suppress(FileNotFoundError):
        if os.path.samestat(folder.lstat(), os.fstat(descriptor)):
            return descriptor
    os.close(descriptor)
    return None


def remove_stale(folder: Path) -> list[Path]:
    """Remove the workplaces of killed processes in a folder, not below it.

    What such a process had moved away for a new file or folder goes back to its place.

    Returns:
        The removed paths.
    """
    try:
        names = [entry.name for entry in os.scandir(folder) if _WORKPLACE.fullmatch(entry.name)]
    except OSError:  # no such folder
        return []
    removed: list[Path] = []
    for path in (folder / name for name in sorted(names)):
        lock = None if path.is_symlink() else _lock_of_the_dead(path)
        if lock is not None:
            with suppress(OSError):  # it stays where what was there cannot go back
                for replaced in sorted((path / _REPLACED).glob("*")):
                    if not os.path.lexists(folder / replaced.name):
                        replaced.replace(folder / replaced.name)
                shutil.rmtree(path, ignore_errors=True)
                removed.append(path)
            os.close(lock)
    return removed


def _lock_of_the_dead(workplace: Path) -> int | None:
    """Lock a workplace whose process has ended; None where it lives, or where nobody knows."""
    lock = _lock(workplace)
    if lock is None:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a file system without locks
        os.close(lock)
        return None
    return lock


@contextmanager
def _in_one_line(path: Path) -> Iterator[None]:
    """Turn a failed write of anything inside the block into an error about `path`."""
    try:
        yield
    except Exception as error:
        failed_write = _os_error_in(error)
        if failed_write is None:
            raise
        raise _output_error(path, failed_write) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path and rename it to `path` when the block succeeds.

    Args:
        path: The final file name; its folder is created. A link is replaced, not followed.

    Yields:
        A path of the same name in another folder, not existing yet.

    Raises:
        OutputError: The disk is full or the folder cannot be written to.
    """
    with _in_one_line(path), _workplace(path.parent) as workplace:
        temporary = workplace / path.name
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(_FILE_MODE)
        put_in_place(temporary, path)


@contextmanager
def atomic_folder(path: Path, ours: Collection[str] | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder that takes the place of `path` when the block succeeds.

    Args:
        path: The final folder.
        ours: Names in an existing folder that are not kept; others are, unless the new folder has
            the same name. None keeps nothing.

    Yields:
        The temporary folder, of the same name.

    Raises:
        OutputError: The disk is full, the parent cannot be written to, or `path` is a file.
    """
    with _in_one_line(path), _workplace(path.parent) as workplace:
        temporary = workplace / path.name
        temporary.mkdir()
        yield temporary
        if os.path.lexists(path) and not path.is_dir():
            raise OutputError(f"{path}: is a file, expected a folder. Move it elsewhere.")
        if ours is not None and path.is_dir():
            for entry in sorted(path.iterdir()):
                new = temporary / entry.name
                if entry.name not in ours and not os.path.lexists(new) and not is_workplace(entry):
                    link_tree(entry, new)
        put_in_place(temporary, path)


def is_workplace(path: Path) -> bool:
    """Whether a path has the name of a folder of temporaries."""
    return _WORKPLACE.fullmatch(path.name) is not None


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a finished file or folder its final name; an old folder goes where the new one was.

    Raises:
        OSError: It cannot be renamed; what was there is there.
    """
    if not temporary.is_dir() or not path.is_dir():
        temporary.replace(path)
    elif not _exchange(temporary, path):
        # Two renamings. A kill between them is mended by `remove_stale`.
        replaced = temporary.parent / _REPLACED / path.name
        replaced.parent.mkdir()
        path.replace(replaced)
        try:
            temporary.replace(path)
        except BaseException:
            replaced.replace(path)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at one instant; return whether this system can.

    Raises:
        OSError: It can, but not these.
    """
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    if function(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def link_tree(source: Path, target: Path) -> None:
    """Make `target` what `source` is: the same files (`link_or_copy`), links as links.

    Raises:
        OSError: It cannot be.
    """
    if source.is_symlink():
        target.symlink_to(source.readlink())
    elif source.is_dir():
        target.mkdir()
        for entry in sorted(source.iterdir()):
            link_tree(entry, target / entry.name)
        shutil.copystat(source, target)
    else:
        link_or_copy(source, target)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


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
    write_bytes(path, json_text(value).encode())


def json_text(value: Any) -> str:
    """Return `value` as `write_json` writes it."""
    return json.dumps(value, indent=2) + "\n"


def digest_of(**parts: Any) -> str:
    """Return the hexadecimal SHA-256 of JSON values by name, whatever their order.

    >>> digest_of(a=1, b=2) == digest_of(b=2, a=1) != digest_of(a=1, b=3)
    True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
