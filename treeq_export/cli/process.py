"""What a command's process sets right before anything else, and how signals end it.

Ctrl-C (SIGINT) and SIGTERM raise an exception, so that what is open is closed and what is temporary
is removed. Python runs a signal's handler between two of its own instructions only; where a library
does not come back within `GRACE_S`, the process ends as it stands. Its children end with it, and
files are in place as a whole or not at all (artefacts.py).
"""

import os
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

GRACE_S = 1.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_status(self) -> int:
        """What shells expect of a process that a signal has ended."""
        return 128 + self.number


def open_standard_streams() -> None:
    """Open on /dev/null what the caller has closed of stdin, stdout and stderr.

    The next file that is opened would get such a number, and what a library prints would go there.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


@contextmanager
def orderly_end() -> Generator[None]:
    """Let SIGINT and SIGTERM end the block by `Interrupted`, or the process soon after.

    A signal that is ignored, or that the program handles already, is left alone; a thread that is
    not the main one can set no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = threading.Event()

    def handle(number: int, _frame: FrameType | None) -> None:
        handled.set()
        raise Interrupted(number)

    plain = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        if before[number] in plain:
            signal.signal(number, handle)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(reader, handle, handled), daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        os.close(writer)
        for number in _SIGNALS:
            if signal.getsignal(number) is handle:
                signal.signal(number, before[number])


def _watch(reader: int, handle: object, handled: threading.Event) -> None:
    """End the process where a signal's handler does not get to run."""
    with os.fdopen(reader, "rb", buffering=0) as signals:
        while byte := signals.read(1):
            number = byte[0]
            # A command may have a handler of its own.
            if number not in _SIGNALS or signal.getsignal(number) is not handle:
                continue
            if not handled.wait(GRACE_S) and signal.getsignal(number) is handle:
                os._exit(128 + number)
