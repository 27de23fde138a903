"""Memory of a server and of its models' processes, sampled while a load runs.

Triton's Python models are processes of their own, children of the server, which exchange tensors
with it by shared memory. So the whole tree is summed, and a page that several of its processes
share is counted once (Linux: Pss_Anon + Pss_Shmem of smaps_rollup). Pages of files are left out of
what is watched: they are the page cache's, and their share changes whenever another program maps
the same library. Where the system does not tell them apart RSS is summed, and the record says so.
"""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

from treeq_export.client.load_statistics import quarter_growth, slope_mb_per_min
from treeq_export.errors import ServeError
from treeq_export.records.loadtest import MemoryTrace

_INTERVAL_S = 1.0
_GONE = (psutil.NoSuchProcess, psutil.ZombieProcess, ProcessLookupError, FileNotFoundError)
_OWN = ("Pss_Anon", "Pss_Shmem")


@dataclass(frozen=True)
class MemorySample:
    """One look at the tree of processes.

    Attributes:
        second: When.
        size: Bytes.
        pss: Bytes with the pages of files; None where the system does not say.
        num_processes: Number of processes in the tree.
    """

    second: float
    size: int
    pss: int | None
    num_processes: int


def find_process(pid: int) -> psutil.Process:
    """Return the server's process.

    Raises:
        ServeError: There is none on this machine.
    """
    try:
        return psutil.Process(pid)
    except (psutil.NoSuchProcess, ValueError) as error:
        raise ServeError(
            f"server-pid: received {pid}, expected a process of this machine. `pgrep tritonserver` "
            "prints it; leave the option out for a server elsewhere.",
            kind="refused",
        ) from error


def read_rollup(pid: int) -> tuple[int, int] | None:
    """Return a process' own bytes and its PSS; None where this system does not say.

    Raises:
        ProcessLookupError, FileNotFoundError: The process is gone.
    """
    if not Path("/proc/self/smaps_rollup").is_file():
        return None
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except PermissionError:
        return None
    fields = dict(line.split(":", 1) for line in text.splitlines()[1:])
    if not all(name in fields for name in (*_OWN, "Pss")):
        return None
    sizes = {name: 1024 * int(fields[name].split()[0]) for name in (*_OWN, "Pss")}
    return sum(sizes[name] for name in _OWN), sizes["Pss"]


def sample_tree(process: psutil.Process, second: float, *, own: bool) -> MemorySample:
    """Return the memory of a process and its descendants; all zero if it is gone.

    Args:
        process: The root.
        second: Time of the sample.
        own: Whether to read what `read_rollup` does, else RSS.
    """
    size = pss = num = 0
    try:
        tree = [process, *process.children(recursive=True)]
    except _GONE:
        tree = []
    for each in tree:
        try:
            both = (read_rollup(each.pid) if own else None) or (each.memory_info().rss, 0)
        except _GONE:
            continue
        size, pss, num = size + both[0], pss + both[1], num + 1
    return MemorySample(second, size, pss if own else None, num)


def make_trace(samples: list[MemorySample], *, own: bool) -> MemoryTrace:
    """Return samples with their slope and growth.

    Args:
        samples: In order of time; those after the server's end are dropped.
        own: Whether the sizes are those of `read_rollup`, else RSS.
    """
    alive = [sample for sample in samples if sample.num_processes]
    sizes = [sample.size for sample in alive]
    growth = quarter_growth(sizes)
    return MemoryTrace(
        kind="own" if own else "rss",
        seconds=[round(sample.second, 2) for sample in alive],
        bytes=sizes,
        pss_bytes=[sample.pss for sample in alive if sample.pss is not None],
        num_processes=[sample.num_processes for sample in alive],
        slope_mb_per_min=slope_mb_per_min([sample.second for sample in alive], sizes),
        growth_bytes=None if growth is None else growth[0],
        growth_fraction=None if growth is None else round(growth[1], 6),
    )


class MemorySampler:
    """Samples once per second while it is entered; a context manager.

    Args:
        process: The server.
        interval_s: Between two samples.
    """

    def __init__(self, process: psutil.Process, interval_s: float = _INTERVAL_S) -> None:
        self.process = process
        self.interval_s = interval_s
        self._own = _can_read_rollup(process)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load-memory", daemon=True)
        self._samples: list[MemorySample] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def trace(self) -> MemoryTrace:
        """Return what was sampled until the server was gone, or the block left."""
        return make_trace(self._samples, own=self._own)

    def _run(self) -> None:
        begin = due = time.perf_counter()
        while True:
            second = time.perf_counter() - begin
            self._samples.append(sample_tree(self.process, second, own=self._own))
            due += self.interval_s
            if self._stop.wait(max(due - time.perf_counter(), 0.0)):
                return


def _can_read_rollup(process: psutil.Process) -> bool:
    try:
        return read_rollup(process.pid) is not None
    except _GONE:
        return False
