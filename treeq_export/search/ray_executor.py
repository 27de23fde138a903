"""Evaluations on Ray workers: on this machine, or on the cluster that RAY_ADDRESS names.

Each worker is an actor that builds its own measuring worker and gets one task at a time, the next
when it is free. A value depends on its key alone, so any number of workers gives the same values,
only in another order. An actor whose process dies is started again and its task is measured again;
a task that kills its worker every time ends the search with one line. After a `kill -9` of the
search its workers end within seconds, two small helpers of Ray after a minute (fixed in Ray).
"""

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from typing import Any, Self

from treeq_export.children import end_with_parent
from treeq_export.errors import RunnerError, TreeqError
from treeq_export.scratch import scratch_folder
from treeq_export.search.executor import Task, Worker

ATTEMPTS_PER_TASK = 4
CONNECT_TIMEOUT_S = 10.0
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of tasks that nobody waits for after another's error
}
OBJECT_STORE_BYTES = 80 << 20  # Ray's least is 75 MiB; tasks and values are a few kilobytes


class RayExecutor:
    """Measures on `num_workers` processes. Ray runs from entering to leaving the with statement.

    Args:
        make_worker: Returns the worker; called once in each process, so it must be something that
            cloudpickle can send: a module's function, or a functools.partial of one.
        num_workers: Number of processes.
        threads: Threads of each; OMP_NUM_THREADS in the workers, and the CPUs they ask Ray for.
    """

    def __init__(self, make_worker: Callable[[], Worker], num_workers: int, threads: int) -> None:
        self._make_worker = make_worker
        self._num_workers = num_workers
        self._threads = threads
        self._ray: Any = None
        self._actors: list[Any] = []
        self._resources = ExitStack()

    def __enter__(self) -> Self:
        """Start Ray, or join the cluster.

        Raises:
            RunnerError: Ray is missing, does not start, or the cluster has too few CPUs.
        """
        try:
            import ray
        except ImportError as error:
            raise RunnerError(
                "ray: not installed, but the search's executor is ray. "
                "Run `pip install 'treeq-export[ray]'`, or use the local executor."
            ) from error
        self._ray = ray
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._actors = []
        self._resources.close()

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, str, float]]:
        """Yield task, suffix and value, a whole task at a time, as workers finish.

        Raises:
            TreeqError: A worker raised it.
            RunnerError: A task ended its worker's process at every attempt.
        """
        waiting = iter(tasks)
        running = {
            actor.measure.remote(task): (actor, task)
            for actor, task in zip(self._actors, waiting, strict=False)
        }
        while running:
            (done,), _ = self._ray.wait(list(running))
            actor, task = running.pop(done)
            following = next(waiting, None)
            if following is not None:
                running[actor.measure.remote(following)] = actor, following
            for suffix, value in zip(task.suffixes, self._values(done, task), strict=True):
                yield task, suffix, value

    def _values(self, done: Any, task: Task) -> list[float]:
        """Return what a worker measured; raise what it raised."""
        try:
            result = self._ray.get(done)
        except self._ray.exceptions.RayActorError as error:
            raise RunnerError(
                f"{task.node}: lost with its worker's process in {ATTEMPTS_PER_TASK} attempts "
                f"({_last_line(error)}). If memory ran out, use fewer workers."
            ) from error
        if isinstance(result, TreeqError):
            raise result
        return result

    def _start(self) -> None:
        """Initialise Ray and make the actors; what is to be undone goes to `_resources`."""
        num_cpus = self._num_workers * self._threads
        try:
            self._resources.enter_context(_ray_session(self._ray, num_cpus))
        except Exception as error:
            address = os.environ.get("RAY_ADDRESS")
            raise RunnerError(
                f"ray: cannot join the cluster at RAY_ADDRESS={address} ({_last_line(error)}). "
                "Correct or unset it; a cluster with tokens needs RAY_AUTH_MODE=token as well."
                if address
                else f"ray: does not start ({_last_line(error)}). Use the local executor."
            ) from error
        available = int(self._ray.cluster_resources().get("CPU", 0))
        if available < num_cpus:
            raise RunnerError(
                f"ray: the cluster has {available} CPUs. Expected {num_cpus}, for "
                f"{self._num_workers} workers of {self._threads} threads. Use fewer of either."
            )
        measurer = self._ray.remote(_Measurer).options(
            num_cpus=self._threads,
            max_restarts=-1,
            max_task_retries=ATTEMPTS_PER_TASK - 1,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(self._threads)}},
        )
        for _ in range(self._num_workers):
            self._actors.append(measurer.remote(self._make_worker))
            self._resources.callback(self._ray.kill, self._actors[-1])


class _Measurer:
    """The actor: builds its worker at the first task, so that its errors come back like others."""

    def __init__(self, make_worker: Callable[[], Worker]) -> None:
        end_with_parent(os.getppid())  # Ray's own look takes seconds
        self._make_worker = make_worker
        self._worker: Worker | None = None

    def measure(self, task: Task) -> list[float] | TreeqError:
        """Return the task's values, or the error that the user is to see, as it was raised."""
        try:
            if self._worker is None:
                self._worker = self._make_worker()
            return list(self._worker.measure(task))
        except TreeqError as error:
            return error


@contextmanager
def _ray_session(ray: Any, num_cpus: int) -> Iterator[None]:
    """Start Ray here, or join a cluster; afterwards leave the process as it was.

    A session that this process has already is used as it is and goes on. Meanwhile stdout goes to
    stderr, since Ray prints there when a worker dies, and stdout is for results.
    """
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    with ExitStack() as undo:
        undo.callback(_restore_process, dict(os.environ), signal.getsignal(signal.SIGTERM))
        address = os.environ.get("RAY_ADDRESS", "")
        if address:
            _connect_once(address)
        else:
            folder = undo.enter_context(scratch_folder())
            options |= {
                "address": "local",
                "num_cpus": num_cpus,
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
                "_temp_dir": str(folder),
            }
        os.environ |= RAY_ENVIRONMENT
        logging.getLogger("ray").setLevel(logging.ERROR)  # ray.init sets it too late for itself
        undo.enter_context(redirect_stdout(sys.stderr))
        undo.callback(ray.shutdown)
        ray.init(**options)
        yield


def _connect_once(address: str) -> None:
    """Raise OSError where nobody listens, since Ray would try for more than ten minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()


def _restore_process(environment: dict[str, str], on_sigterm: Any) -> None:
    """Undo what Ray changed: environment variables and the handler of SIGTERM."""
    for name in {name for name in {**os.environ, **environment} if _is_of_ray(name)}:
        if name in environment:
            os.environ[name] = environment[name]
        else:
            os.environ.pop(name, None)
    with suppress(ValueError):  # not the main thread, which alone may set and has not been changed
        signal.signal(signal.SIGTERM, on_sigterm)


def _is_of_ray(variable: str) -> bool:
    return variable.startswith("RAY_") or variable == "PYTHONBREAKPOINT"


def _last_line(error: Exception) -> str:
    return str(error).strip().split("\n")[-1].strip().rstrip(".")
