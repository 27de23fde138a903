"""Closed-loop clients: each sends a request, waits for its answer, and sends the next.

Clients are threads of this process, each with a connection of its own. Threads wait for the network
without Python's lock, so what they share is the time to encode and decode, 0.2 to 0.7 ms per
request: eight of them reach 2900 requests per second of a model that answers at once, and met the
latencies that eight processes met of models of 5 and 20 ms, for half the processor time. (2 cores,
shared with the server; the record of a load test holds its own cost.) And threads end with their
process, whatever ends that. Two things that would show in the latencies are put away while they
run: a thread that needs the lock gets it within 0.5 ms, not 5 ms, and the garbage collector does
not walk over what was there before.

Each phase ends with the last answer: no request is under way between a warm-up and what is
measured, so the server's counters before and after belong to exactly the measured requests.
"""

import gc
import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Self

from treeq_export.errors import ServeError
from treeq_export.progress import OnStep

# Prepares request number i and returns what sends it; only the second call is timed.
Prepare = Callable[[int], Callable[[], object]]
OpenClient = Callable[[], AbstractContextManager[Prepare]]

GIVE_UP_AFTER = 10  # failures in a row of one client
_PAUSE_S = 0.2  # after a failure, lest a dead server be asked thousands of times
_LOOK_S = 0.2  # how often progress is told
_SWITCH_S = 0.0005
_JOIN_S = 3.0


@dataclass(frozen=True)
class Answer:
    """One request.

    Attributes:
        sent_s: When it was sent, by `time.perf_counter`.
        latency_s: Until its answer was decoded.
        error: Why there was none; None where there was.
    """

    sent_s: float
    latency_s: float
    error: str | None = None


@dataclass(frozen=True)
class PhaseResult:
    """What all clients met in one phase.

    Attributes:
        answers: In the order in which they were sent.
        duration_s: From the first request to the last answer.
        cpu_s: Processor time of this process meanwhile.
        complete: Whether no client gave up.
    """

    answers: Sequence[Answer]
    duration_s: float
    cpu_s: float
    complete: bool


@dataclass(frozen=True)
class _Phase:
    """What a client is told to do.

    Attributes:
        until_s: When it sends its last request, by `time.perf_counter`.
        first: Number of its first request.
        stride: From each of its requests to its next.
    """

    until_s: float
    first: int
    stride: int


class _Client(threading.Thread):
    """One client; does a phase for each that is put into `phases`, None ends it."""

    def __init__(self, open_client: OpenClient, stop: threading.Event) -> None:
        super().__init__(name="load-client", daemon=True)
        self.phases: queue.SimpleQueue[_Phase | None] = queue.SimpleQueue()
        self.results: queue.SimpleQueue[list[Answer] | BaseException] = queue.SimpleQueue()
        self.gave_up = False
        self._open = open_client
        self._stop_now = stop

    def run(self) -> None:
        try:
            with self._open() as prepare:
                while (phase := self.phases.get()) is not None:
                    self.results.put(self._loop(prepare, phase))
        except BaseException as error:  # it is raised where the phase was asked for
            self.results.put(error)

    def _loop(self, prepare: Prepare, phase: _Phase) -> list[Answer]:
        """Send one request after another, one at least."""
        answers: list[Answer] = []
        number, num_in_a_row = phase.first, 0
        while not self._stop_now.is_set():
            answers.append(_send(prepare(number)))
            number += phase.stride
            num_in_a_row = 0 if answers[-1].error is None else num_in_a_row + 1
            if num_in_a_row == GIVE_UP_AFTER:
                self.gave_up = True
                break
            if num_in_a_row:
                self._stop_now.wait(_PAUSE_S)
            if time.perf_counter() >= phase.until_s:
                break
        return answers


def _send(call: Callable[[], object]) -> Answer:
    begin = time.perf_counter()
    try:
        call()
    except ServeError as error:
        return Answer(begin, time.perf_counter() - begin, str(error))
    return Answer(begin, time.perf_counter() - begin)


class Clients:
    """A number of clients, connected as long as this is entered; a context manager.

    Args:
        open_client: Opens one client's connection, in the client's thread.
        num: Number of clients.
    """

    def __init__(self, open_client: OpenClient, num: int) -> None:
        self._stop = threading.Event()
        self._clients = [_Client(open_client, self._stop) for _ in range(num)]

    def __enter__(self) -> Self:
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        end = time.monotonic() + _JOIN_S
        for client in self._clients:
            client.phases.put(None)
        for client in self._clients:
            client.join(max(end - time.monotonic(), 0.0))

    def run(self, duration_s: float, first: int, on_progress: OnStep) -> PhaseResult:
        """Let all clients send for a while.

        Args:
            duration_s: No request is sent later; those under way are waited for.
            first: Number of the first request; the clients' numbers are interleaved, so the same
                requests are sent whatever the server's speed, as far as it gets.
            on_progress: Called with the seconds that have passed.

        Raises:
            BaseException: What a client met other than a failed request.
        """
        with _undisturbed():
            begin, cpu = time.perf_counter(), time.process_time()
            for place, client in enumerate(self._clients):
                phase = _Phase(begin + duration_s, first + place, len(self._clients))
                client.phases.put(phase)
            answers: list[Answer] = []
            for client in self._clients:
                answers += _wait_for(client, lambda: on_progress(time.perf_counter() - begin))
            cpu = time.process_time() - cpu
        answers.sort(key=lambda answer: answer.sent_s)
        last = max((answer.sent_s + answer.latency_s for answer in answers), default=begin)
        return PhaseResult(
            answers=answers,
            duration_s=last - (answers[0].sent_s if answers else begin),
            cpu_s=cpu,
            complete=not any(client.gave_up for client in self._clients),
        )


def _wait_for(client: _Client, on_wait: Callable[[], None]) -> list[Answer]:
    while True:
        try:
            result = client.results.get(timeout=_LOOK_S)
        except queue.Empty:
            on_wait()
            continue
        if isinstance(result, BaseException):
            raise result
        return result


@contextmanager
def _undisturbed() -> Generator[None]:
    """Keep what is not the clients' work out of their latencies."""
    interval = sys.getswitchinterval()
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(_SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.unfreeze()
