"""Reading the bytes and texts of files."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from treeq_export.errors import TreeqError
from treeq_export.reading.limits import MAX_BYTES, RefusedError, check_size, decode


def read_bytes(
    path: Path,
    *,
    error: type[TreeqError],
    remedy: str,
    max_bytes: int = MAX_BYTES,
    pipe: bool = False,
) -> bytes:
    """Read a file.

    Args:
        path: The file; a link is followed.
        error: Class of the errors.
        remedy: A sentence that ends every error.
        max_bytes: Largest size.
        pipe: Whether a pipe (as `<(command)` makes one) may stand for the file.

    Raises:
        TreeqError: Missing, not a file, not readable or too large; of the class `error`.
    """
    try:
        with open_file(path, error=error, remedy=remedy, pipe=pipe) as file:
            check_size(os.fstat(file.fileno()).st_size, max_bytes)
            data = file.read(max_bytes + 1 if pipe else -1)  # a pipe has no size
            check_size(len(data), max_bytes)
    except RefusedError as fault:
        raise error(f"{path}: {fault}. {remedy}") from fault
    return data


def read_text(
    path: Path,
    *,
    error: type[TreeqError],
    remedy: str,
    max_bytes: int = MAX_BYTES,
    pipe: bool = False,
) -> str:
    """Read a UTF-8 file; arguments and errors are those of `read_bytes`."""
    data = read_bytes(path, error=error, remedy=remedy, max_bytes=max_bytes, pipe=pipe)
    try:
        return decode(data)
    except RefusedError as fault:
        raise error(f"{path}: {fault}. {remedy}") from fault


@contextmanager
def open_file(
    path: Path, *, error: type[TreeqError], remedy: str, pipe: bool = False
) -> Iterator[BinaryIO]:
    """Open a regular file; whatever the system refuses in the block is one line too."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not (pipe and stat.S_ISFIFO(mode)):
            kind = os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else "not a regular file"
            raise error(f"{path}: cannot be read ({kind}). {remedy}")
        with path.open("rb") as file:
            yield file
    except OSError as fault:
        raise error(f"{path}: cannot be read ({fault.strerror or fault}). {remedy}") from fault
    except RefusedError:
        raise
    except ValueError as fault:  # a NUL in its name
        raise error(f"{str(path)!r}: not the name of a file ({fault}). {remedy}") from fault
