"""Killing a process with signal 9 at any change that it makes below a folder."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from treeq_export import artefacts

# What Python reports (`sys.addaudithook`) before it changes a name or a file: which arguments are
# the path and the open folder, if any, that the path starts from.
_CHANGES = {
    "open": (0, None),
    "os.chmod": (0, 2),
    "os.link": (1, 3),
    "os.mkdir": (0, 2),
    "os.remove": (0, 1),
    "os.rename": (1, 3),
    "os.rmdir": (0, 1),
    "os.symlink": (1, 2),
}
_WRITE = os.O_WRONLY | os.O_RDWR


class Killer:
    """Kills this process before its n-th change below a folder, or in its n-th gap.

    A gap lies between the two renamings that replace a folder where names cannot be exchanged.

    Args:
        below: The folder, without links in its path.
        on: "change" or "gap".
        count: n; 0 kills nothing.
        exchange: Whether names can be exchanged, as by Linux's renameat2.
        counts: Takes the numbers of changes and of gaps so far; shared with another process.
    """

    def __init__(
        self, below: str, on: str, count: int, *, exchange: bool, counts: "memoryview[int]"
    ) -> None:
        self.below, self.on, self.count, self.counts = below, on, count, counts
        self.replaced = ""
        if not exchange:
            artefacts._exchange = lambda *_: False
        sys.addaudithook(self._notice)

    def _notice(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "ctypes.dlsym" and arguments[1] == "renameat2":
            self._count("change")
        if event not in _CHANGES or (event == "open" and not arguments[2] & _WRITE):
            return
        path, folder = _CHANGES[event]
        name = _absolute(arguments[path], -1 if folder is None else arguments[folder])
        if not name.startswith(f"{self.below}/"):
            return
        if event == "os.rename":
            if name == self.replaced:
                self._count("gap")
            self.replaced = os.fspath(arguments[0]) if f"/{artefacts._REPLACED}/" in name else ""
        self._count("change")

    def _count(self, event: str) -> None:
        index = ("change", "gap").index(event)
        self.counts[index] += 1
        if event == self.on and self.counts[index] == self.count:
            os.kill(os.getpid(), signal.SIGKILL)


def _absolute(path: Any, folder: int) -> str:
    """Return the path that an event is about; nothing for a descriptor."""
    if isinstance(path, int):
        return ""
    start = Path.cwd() if folder == -1 else Path(f"/proc/self/fd/{folder}").readlink()
    return str(start / os.fsdecode(path))
