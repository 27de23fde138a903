"""HTTP exchanges that end: each has one deadline, and one number of bytes that it may receive.

A timeout of a socket is for one read; a server that sends a byte now and then never meets it. And
each part of an answer has a way to be endless: the body, its chunks, the headers, interim answers.
So both limits are where all parts come from, in the socket.
"""

import socket
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection
from typing import Any


class TooLargeError(OSError):
    """More bytes than an exchange may receive."""


class BoundedHttp(HTTPConnection):
    """An HTTP connection whose exchanges are bounded; `begin` starts the next one.

    Args:
        host: Name or number.
        port: TCP port.
    """

    def __init__(self, host: str, port: int) -> None:
        super().__init__(host, port)
        self._end = 0.0
        self._bytes_left = 0
        self._aborted = False

    def begin(self, timeout_s: float, max_bytes: int) -> None:
        """Start an exchange.

        Args:
            timeout_s: Longest time for connecting, the request and the answer together.
            max_bytes: Most bytes of the answer.
        """
        self._end = 0.0 if self._aborted else time.monotonic() + timeout_s
        self._bytes_left = max_bytes

    def connect(self) -> None:
        """Connect to the first of the host's addresses that takes it.

        Raises:
            OSError: None does, or not in time.
        """
        failure = OSError(f"no address of {self.host}")
        for family, kind, protocol, _, address in self._resolve():
            sock = _BoundedSocket(self._seconds_left, self._count, family, kind, protocol)
            try:
                sock.settimeout(self._seconds_left())
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                sock.close()
                failure = error
            else:
                self.sock = sock
                return
        raise failure

    def abort(self) -> None:
        """End the exchange under way, from any thread, and all that follow: they fail at once."""
        self._aborted, self._end = True, 0.0
        sock = self.sock
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:  # not connected any more
                return

    def _resolve(self) -> list[tuple[Any, ...]]:
        """Return the host's addresses; the system's resolver has no deadline of its own."""
        found: list[list[tuple[Any, ...]] | OSError] = []

        def ask() -> None:
            try:
                found.append(socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM))
            except OSError as error:
                found.append(error)
            except UnicodeError:
                found.append(OSError("no name of a host"))

        thread = threading.Thread(target=ask, name="resolve", daemon=True)
        thread.start()
        thread.join(self._seconds_left())
        if not found:
            raise TimeoutError("timed out")
        if isinstance(found[0], OSError):
            raise found[0]
        return found[0]

    def _seconds_left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return left

    def _count(self, num: int) -> None:
        self._bytes_left -= num
        if self._bytes_left < 0:
            raise TooLargeError("too large")


class _BoundedSocket(socket.socket):
    """A socket that asks before each wait how long it may be, and tells what it has received."""

    def __init__(
        self, seconds_left: Callable[[], float], count: Callable[[int], None], *args: Any
    ) -> None:
        super().__init__(*args)
        self._seconds_left = seconds_left
        self._count = count

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Receive; what the file of `makefile` reads with."""
        self.settimeout(self._seconds_left())
        num = super().recv_into(buffer, nbytes, flags)
        self._count(num)
        return num

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send all."""
        self.settimeout(self._seconds_left())
        super().sendall(data, flags)
