"""Python processes that this one starts: they end when it ends, however it ends.

A child asks the system to kill it when its parent is gone (Linux). It does so before it imports
anything that takes time, and it looks whether the parent has gone before that:

    python -P -m treeq_export.children PARENT MODULE ARGUMENT...

-P: the folder that a child runs in is no place to import from. A child has no terminal, and no
temporary folder of its own: what it needs comes by its arguments and its input, what it found goes
to its output.
"""

import ctypes
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

_PR_SET_PDEATHSIG = 1


@contextmanager
def python_child(
    module: str,
    *arguments: str,
    environment: Mapping[str, str] = os.environ,
    stdin: int = subprocess.DEVNULL,
    **options: Any,
) -> Iterator["subprocess.Popen[Any]"]:
    """Run `python -m module arguments`; when the block is left the child has ended.

    Args:
        module: Module of this package, or one that the child can import by itself.
        *arguments: Arguments of the module.
        environment: The child's; this package is put in front of its search path.
        stdin: Standard input, as `subprocess.Popen` takes it; nothing by default.
        **options: Further options of `subprocess.Popen`.

    Yields:
        The process.
    """
    path = [str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")]
    child: subprocess.Popen[Any] = subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, str(os.getpid()), module, *arguments],
        env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        stdin=stdin,
        **options,
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout, child.stderr):
            if pipe is not None:
                pipe.close()


def end_with_parent(parent: int) -> None:
    """Let the system kill this process when its parent ends; end at once if it has ended.

    Args:
        parent: Process id of the parent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def take_stdout() -> TextIO:
    """Return what leads to the parent; what libraries print goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
