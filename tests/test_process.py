"""How signals end a command: in order, and soon."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from treeq_export.cli import process
from treeq_export.cli.process import Interrupted, orderly_end

# In the second no handler of Python's gets to run.
WAITS = {
    "python": "time.sleep(60)",
    "native": "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
}
SCRIPT = """\
import hashlib, signal, sys, threading, time
from pathlib import Path
from treeq_export.cli.process import orderly_end
{before}
try:
    with orderly_end():
        threading.Timer(0.5, print, ["ready"], dict(flush=True)).start()
        {wait}
finally:
    Path(sys.argv[1]).touch()
"""


def start(folder: Path, wait: str, before: str = "") -> "subprocess.Popen[bytes]":
    code = SCRIPT.format(wait=wait, before=before)
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(folder / "cleaned")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    child.stdout.close()
    return child


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("kind", WAITS)
def test_a_signal_ends_it(tmp_path: Path, kind: str, name: str) -> None:
    child = start(tmp_path, WAITS[kind])
    child.send_signal(getattr(signal, name))
    child.wait(timeout=30)
    assert (tmp_path / "cleaned").exists() == (kind == "python")
    if kind == "native":
        assert child.returncode == 128 + getattr(signal, name)


@pytest.mark.parametrize(
    "before",
    [
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "signal.signal(signal.SIGTERM, lambda *_: None)",
    ],
)
def test_a_signal_that_is_handled_already_is_left_alone(tmp_path: Path, before: str) -> None:
    child = start(tmp_path, "time.sleep(2.5)", before)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=30) == 0


def test_cleaning_up_may_take_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "GRACE_S", 0.05)

    def meet_signal() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            time.sleep(0.3)

    with pytest.raises(Interrupted) as caught, orderly_end():
        meet_signal()
    assert caught.value.exit_status == 143


def test_handlers_are_as_before() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with orderly_end():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_another_thread_sets_no_handlers() -> None:
    found: list[object] = []

    def look() -> None:
        with orderly_end():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize("closed", ["", ">&-", "<&- >&-", "2>&-", "<&- 2>&-"])
def test_closed_streams_are_opened_on_nothing(tmp_path: Path, closed: str) -> None:
    """Otherwise the next file would be the one that libraries print to."""
    script = (
        "import sys\n"
        "from treeq_export.cli.process import open_standard_streams\n"
        "open_standard_streams()\n"
        "with open(sys.argv[1], 'w') as file:\n"
        "    print('out'), print('error', file=sys.stderr), sys.stdin.read()\n"
        "    file.write(str(file.fileno()))\n"
    )
    (tmp_path / "script.py").write_text(script)
    command = f"exec {sys.executable} {tmp_path}/script.py {tmp_path}/file {closed}"
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    subprocess.run(
        ["sh", "-c", command],
        check=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    assert (tmp_path / "file").read_text() == "3"
