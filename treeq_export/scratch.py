"""Temporary folders that a killed process does not leave for good.

A folder is in use as long as its process holds the lock on a file in it; the system frees that lock
however the process ends. Whoever makes the next folder removes those that are not in use any more.
"""

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "treeq-scratch-"
_LOCK = ".lock"
_YOUNG_S = 60.0  # younger ones may be between their making and their lock


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield an empty folder in the system's temporary folder; it is removed after the block."""
    remove_abandoned(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with (folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder


def remove_abandoned(parent: Path) -> list[Path]:
    """Remove this user's scratch folders whose processes have ended.

    Args:
        parent: The system's temporary folder.

    Returns:
        The removed folders.
    """
    removed: list[Path] = []
    for folder in sorted(parent.glob(f"{_PREFIX}*")):
        with suppress(OSError):
            found = folder.lstat()
            mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
            if mine and time.time() - found.st_mtime > _YOUNG_S and not _is_locked(folder):
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
    return removed


def _is_locked(folder: Path) -> bool:
    """Whether a process holds the folder's lock; one without a lock file was never taken."""
    try:
        number = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    with os.fdopen(number) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
