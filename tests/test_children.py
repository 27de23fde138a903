"""Children end with their parent, however it ends, and leave nothing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from treeq_export import children
from treeq_export.children import python_child

# Starts a child that sleeps, says its process id, and waits.
PARENT = """\
import sys, time
from treeq_export.children import python_child
with python_child("sleeper") as child:
    print(child.pid, flush=True)
    time.sleep(60)
"""
SLEEPER = "import time\ntime.sleep(60)\n"


@pytest.fixture
def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "sleeper"


@pytest.fixture
def parent(sleeper: str) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": f"{Path.cwd()}{os.pathsep}{os.environ['PYTHONPATH']}"},
        text=True,
    ) as process:
        yield process
        process.kill()


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for_end(pid: int, timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not has_ended(pid):
        assert time.monotonic() < end, f"{pid} is still there"
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"])
def test_a_child_ends_with_its_parent(parent: "subprocess.Popen[str]", name: str) -> None:
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert not has_ended(child)
    parent.send_signal(getattr(signal, name))
    parent.wait(timeout=10)
    wait_for_end(child)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_child_that_is_still_starting_ends_too(
    parent: "subprocess.Popen[str]", name: str
) -> None:
    """It says its number at once, before Python has started in the child."""
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(getattr(signal, name))
    wait_for_end(child)


def test_a_child_whose_parent_has_gone_ends_at_once() -> None:
    line = "from treeq_export.children import end_with_parent; end_with_parent(1); print('alive')"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (1, b"")


def test_a_child_has_ended_when_the_block_is_left(sleeper: str) -> None:
    with pytest.raises(ZeroDivisionError), python_child(sleeper, stdout=subprocess.PIPE) as child:
        _ = 1 / 0
    assert child.returncode == -signal.SIGKILL
    assert child.stdout is not None
    assert child.stdout.closed


def test_arguments_input_and_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "echo.py").write_text(
        "import sys\n"
        "from treeq_export.children import take_stdout\n"
        "answer = take_stdout()\n"
        "print('a library talks')\n"
        "answer.write(f'{__name__} {sys.argv[1:]} {sys.stdin.read()} {sys.path[0]!r}')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pipe = subprocess.PIPE
    with python_child(
        "echo", "a b", "", cwd="/", stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as child:
        answer, words = child.communicate("in")
    package = str(Path(children.__file__).parents[1])
    assert answer == f"__main__ ['a b', ''] in {package!r}"
    assert words == "a library talks\n"
