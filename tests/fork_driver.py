"""Runs `treeq-export` as a process of its own, again and again, without its start-up time.

One JSON order a line on stdin, one JSON answer a line on stdout. Every command runs in a child
forked from this process, which has imported everything and never computes anything:

    {"args": [...], "trap": {...}|null}  run a command -> {"status", "stdout", ...}

A negative status is the signal that ended the child. A trap acts while a stage is at work:

    {"stage": name, "on": "start" | "step" | "replace", "count": n, "action": action}

on the n-th progress step, or before the n-th file or folder takes its final name. The action is
the name of a signal that the child sends to itself, "ENOSPC" (a write that fails), or a number: no
file may grow above so many bytes from then on until the stage ends. Another trap is a `Killer`, for
a whole command of any kind:

    {"below": folder, "on": "change" | "gap", "count": n, "exchange": bool}

With it the answer has "changes" and "gaps": how many there were until the end.

What takes long and has its own tests is replaced: exports come from the cache of the tests, and
bench's processes that measure memory are not started.
"""

import dataclasses
import errno
import json
import mmap
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers

import treeq_export.bench.stage
import treeq_export.compile.stage
from tests.commands import measure_nothing
from tests.export_cache import export_once
from tests.killer import Killer
from treeq_export import artefacts
from treeq_export.cli import main
from treeq_export.pipeline import run as pipeline
from treeq_export.pipeline.workspace import Workspace


class Trap:
    """Acts once, at the n-th event of one kind."""

    def __init__(self, on: str, count: int, action: str | int) -> None:
        self.on, self.left, self.action = on, count, action

    def notice(self, event: str) -> None:
        self.left -= event == self.on
        if event != self.on or self.left != 0:
            return
        if isinstance(self.action, int):
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.action, resource.RLIM_INFINITY))
        elif self.action == "ENOSPC":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            os.kill(os.getpid(), getattr(signal, self.action))

    def wrap(self, execute: Callable[..., object]) -> Callable[..., object]:
        put_in_place = artefacts.put_in_place

        def replace_or_act(temporary: Path, path: Path) -> None:
            self.notice("replace")
            put_in_place(temporary, path)

        def work(workspace: Workspace, on_step: Callable[[float], None]) -> object:
            def step(fraction: float) -> None:
                on_step(fraction)
                self.notice("step")

            artefacts.put_in_place = replace_or_act
            self.notice("start")
            try:
                return execute(workspace, step)
            finally:
                artefacts.put_in_place = put_in_place
                unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
                resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

        return work


def set_trap(stage: str, **trap: Any) -> None:
    work = Trap(**trap).wrap(pipeline.stage_named(stage).execute)
    pipeline.STAGES = tuple(
        dataclasses.replace(each, execute=work) if each.name == stage else each
        for each in pipeline.STAGES
    )


def call(args: list[str], trap: dict[str, Any] | None, counts: "memoryview[int]") -> int:
    """Run a command as Python would run its script; return its exit status."""
    status = 1
    try:
        if trap is not None and "below" in trap:
            Killer(**trap, counts=counts)
        elif trap is not None:
            set_trap(**trap)
        main(args, prog_name="treeq-export")
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def run_child(args: list[str], trap: dict[str, Any] | None) -> dict[str, Any]:
    counts = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")  # shared with the child
    # stderr is a pipe, since the trap's limit holds for every regular file.
    receive, send = os.pipe()
    with tempfile.TemporaryFile() as stdout, Path(os.devnull).open() as nothing:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number, file in enumerate((nothing.fileno(), stdout.fileno(), send)):
                os.dup2(file, number)
            os.close(send)
            os.close(receive)
            os._exit(call(args, trap, counts))
        os.close(send)
        with os.fdopen(receive, "rb") as stderr:
            errors = stderr.read()
        _, status, usage = os.wait4(pid, 0)
        stdout.seek(0)
        output = stdout.read()
    return {
        "status": os.waitstatus_to_exitcode(status),
        "stdout": output.decode(),
        "stderr": errors.decode(),
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "changes": counts[0],
        "gaps": counts[1],
    }


def serve() -> None:
    _ = diffusers.DiTTransformer2DModel  # diffusers imports its classes on first use
    treeq_export.compile.stage.export_graph = export_once
    treeq_export.bench.stage.measure_memory = measure_nothing
    for line in sys.stdin:
        order = json.loads(line)
        answer = run_child(order["args"], order["trap"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
