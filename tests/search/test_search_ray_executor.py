"""Ray workers give the values of the local executor, also when one of them is killed."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from treeq_export.errors import PlanError, RunnerError
from treeq_export.search.executor import LocalExecutor, Tally, Task, measure_all
from treeq_export.search.journal import Journal
from treeq_export.search.ray_executor import RayExecutor

GONE_TIMEOUT_S = 20.0
DRIVER = """
import sys, time
from treeq_export.search.ray_executor import RayExecutor
from treeq_export.search.executor import Task

class Worker:
    def measure(self, task):
        yield from [1.0, 2.0]

if __name__ == "__main__":
    with RayExecutor(Worker, 1, 1) as executor:
        values = [value for _, _, value in executor.run([Task("root", "", ("a", "b"))])]
        print(values, file=sys.__stdout__, flush=True)
        time.sleep(60)
"""


class FakeWorker:
    """Logs each call to a file; at a node named "kill" it ends its process the first time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with (folder / "built").open("a") as file:
            file.write(f"{os.getpid()}\n")

    def measure(self, task: Task) -> Iterator[float]:
        for suffix in task.suffixes:
            if task.node == "error":
                raise PlanError("blocks.0: received 3 bits. Expected 4.")
            if task.node == "kill" and suffix == "2" and is_first(self.folder / "killed"):
                os.kill(os.getpid(), signal.SIGKILL)
            with (self.folder / "calls").open("a") as file:
                file.write(f"{task.node} {task.prefix} {suffix}\n")
            if task.node == "threads":
                yield float(os.environ["OMP_NUM_THREADS"])
            else:
                yield (int(task.prefix) + 0.1) / (int(suffix) + 3)


def is_first(marker: Path) -> bool:
    """Return whether no other call, in any process, has asked for this marker."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray-workers")


def find_survivors(processes: set[psutil.Process]) -> list[psutil.Process]:
    """Return the processes that are still at work after a while."""
    end = time.monotonic() + GONE_TIMEOUT_S
    while alive := [process for process in processes if is_at_work(process)]:
        if time.monotonic() > end:
            return alive
        time.sleep(0.05)
    return []


def is_at_work(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def executor(folder: Path) -> Iterator[RayExecutor]:
    """Two workers; once they have been left, nothing of Ray is to be seen."""
    from ray.cloudpickle import register_pickle_by_value, unregister_pickle_by_value

    register_pickle_by_value(sys.modules[__name__])  # workers cannot import it
    others = set(psutil.Process().children(recursive=True))
    on_sigterm = signal.getsignal(signal.SIGTERM)
    environment = dict(os.environ) | {"PYTEST_CURRENT_TEST": ""}
    with RayExecutor(partial(FakeWorker, folder), num_workers=2, threads=1) as executor:
        yield executor
        started = set(psutil.Process().children(recursive=True)) - others
    unregister_pickle_by_value(sys.modules[__name__])
    assert len(started) > 2
    assert find_survivors(started) == []
    assert signal.getsignal(signal.SIGTERM) == on_sigterm
    assert dict(os.environ) | {"PYTEST_CURRENT_TEST": ""} == environment


def test_values_of_a_killed_worker_too_are_those_of_the_local_executor(
    executor: RayExecutor, folder: Path, tmp_path: Path
) -> None:
    tasks = [Task("kill", str(prefix), ("1", "2", "3")) for prefix in range(6)]
    with Journal(tmp_path / "ray.sqlite", "f") as journal:
        tally = Tally()
        values = measure_all(tasks, journal, executor, tally)
        assert measure_all(tasks, journal, executor, tally) == values
    assert (tally.num_measured, tally.num_reused) == (18, 18)
    (tmp_path / "killed").touch()
    with (
        Journal(tmp_path / "local.sqlite", "f") as journal,
        LocalExecutor(partial(FakeWorker, tmp_path)) as local,
    ):
        expected = measure_all(tasks, journal, local, Tally())
    assert list(values.items()) == list(expected.items())
    calls = Counter(read_lines(folder / "calls"))
    assert set(calls) == set(read_lines(tmp_path / "calls"))
    assert calls.total() == 19  # the killed task's first value twice
    assert len(set(read_lines(folder / "built"))) == 3


def test_workers_have_their_number_of_threads(executor: RayExecutor) -> None:
    task = Task("threads", "0", ("1",))
    assert list(executor.run([task])) == [(task, "1", 1.0)]


def test_error_of_a_worker_reaches_the_caller_as_itself(executor: RayExecutor) -> None:
    with pytest.raises(PlanError) as caught:
        list(executor.run([Task("error", "0", ("1",))]))
    assert caught.type is PlanError
    assert str(caught.value) == "blocks.0: received 3 bits. Expected 4."


@pytest.mark.usefixtures("executor")
def test_too_few_cpus_in_the_session_of_the_process(folder: Path) -> None:
    with (
        pytest.raises(RunnerError, match=r"cluster has 2 CPUs\. Expected 3, for 1 workers of 3"),
        RayExecutor(partial(FakeWorker, folder), num_workers=1, threads=3),
    ):
        pass


def test_workers_do_not_outlive_a_killed_search() -> None:
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,  # short, for sockets
        subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": folder},
        ) as driver,
    ):
        assert driver.stdout is not None
        line = driver.stdout.readline()
        started = set(psutil.Process(driver.pid).children(recursive=True))
        agents = {process for process in started if "Agent" in process.name()}
        driver.kill()
    assert line == "[1.0, 2.0]\n"
    survivors = find_survivors(started - agents)
    for agent in agents:  # Ray gives them a minute
        agent.kill()
    assert len(started - agents) > 2
    assert survivors == []


def test_missing_ray_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(RunnerError, match=r"ray: not installed.*'treeq-export\[ray\]'"),
        RayExecutor(partial(FakeWorker, Path()), 1, 1),
    ):
        pass


class FakeActor:
    """Runs a task in this process as soon as it gets it."""

    def __init__(self, actor: Any) -> None:
        self.num_running = 0
        self.measure = SimpleNamespace(remote=partial(self._run, actor))

    def _run(self, actor: Any, task: Task) -> "FakeReference":
        self.num_running += 1
        assert self.num_running == 1
        return FakeReference(self, actor.measure(task))


class FakeReference:
    def __init__(self, actor: FakeActor, result: object) -> None:
        self.actor = actor
        self.result = result


class FakeRay(SimpleNamespace):
    """Ray's functions that the executor calls, in this process; the last task is done first."""

    def __init__(self) -> None:
        super().__init__(
            options={}, actor_options={}, num_cpus=0, dies=False, num_shutdowns=0, killed=[]
        )
        self.exceptions = SimpleNamespace(RayActorError=ProcessLookupError)

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: Any) -> None:
        self.options = options
        os.environ["RAY_ADDRESS"] = "changed"

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.num_cpus)} if self.num_cpus else {}

    def remote(self, actor_class: Any) -> Any:
        return SimpleNamespace(options=partial(self._with_options, actor_class))

    def _with_options(self, actor_class: Any, **options: Any) -> Any:
        self.actor_options = options
        return SimpleNamespace(remote=lambda *arguments: FakeActor(actor_class(*arguments)))

    def wait(self, references: list[FakeReference]) -> tuple[list[FakeReference], object]:
        references[-1].actor.num_running -= 1
        return references[-1:], references[:-1]

    def get(self, reference: FakeReference) -> object:
        if self.dies:
            raise ProcessLookupError("The actor died.\n  No module named 'treeq_export'.")
        return reference.result

    def kill(self, actor: FakeActor) -> None:
        self.killed.append(actor)

    def shutdown(self) -> None:
        self.num_shutdowns += 1


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


def enter(num_workers: int = 1) -> None:
    with RayExecutor(partial(FakeWorker, Path()), num_workers, threads=2):
        pass


def test_starts_on_this_machine_and_cleans_up(
    fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(RunnerError, match=r"the cluster has 0 CPUs\. Expected 6"):
        enter(num_workers=3)
    assert fake_ray.options["address"] == "local"
    assert fake_ray.options["num_cpus"] == 6
    assert not Path(fake_ray.options["_temp_dir"]).exists()
    assert fake_ray.num_shutdowns == 1
    assert "RAY_ADDRESS" not in os.environ


def test_joins_the_cluster_of_the_environment(
    fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(RunnerError, match="the cluster has 0 CPUs"):
            enter()
    assert set(fake_ray.options) == {"logging_level", "log_to_driver"}
    assert os.environ["RAY_ADDRESS"] == address


def test_address_where_nobody_listens(fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"ray://127.0.0.1:{server.getsockname()[1]}")
    with pytest.raises(RunnerError, match=r"RAY_ADDRESS=ray://.*refused\)\. Correct or unset it"):
        enter()
    assert fake_ray.options == {}


def test_ray_that_does_not_start(fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(fake_ray, "init", partial(int, "no number"))
    with pytest.raises(RunnerError, match=r"^ray: does not start \(.*\)\. Use the local executor"):
        enter()
    assert fake_ray.num_shutdowns == 1


def test_each_worker_has_one_task_at_a_time(fake_ray: FakeRay, tmp_path: Path) -> None:
    fake_ray.num_cpus = 4
    tasks = [Task("root", str(prefix), ("1", "2")) for prefix in range(5)]
    with RayExecutor(partial(FakeWorker, tmp_path), num_workers=2, threads=2) as executor:
        results = list(executor.run(tasks))
        assert list(executor.run([])) == []
    assert [task.prefix for task, _, _ in results[::2]] == ["1", "2", "3", "4", "0"]
    with LocalExecutor(partial(FakeWorker, tmp_path)) as local:
        assert set(results) == set(local.run(tasks))
    assert len(read_lines(tmp_path / "built")) == 3
    assert len(fake_ray.killed) == 2
    assert fake_ray.actor_options["num_cpus"] == 2
    assert fake_ray.actor_options["runtime_env"] == {"env_vars": {"OMP_NUM_THREADS": "2"}}


def test_error_while_the_worker_is_built(fake_ray: FakeRay) -> None:
    fake_ray.num_cpus = 1

    def make_worker() -> FakeWorker:
        raise PlanError("plan.json: missing.")

    with (
        RayExecutor(make_worker, num_workers=1, threads=1) as executor,
        pytest.raises(PlanError, match=r"^plan\.json: missing\.$"),
    ):
        list(executor.run([Task("root", "0", ("1",))]))


def test_task_that_ends_its_worker_at_every_attempt(fake_ray: FakeRay, tmp_path: Path) -> None:
    fake_ray.num_cpus = 1
    fake_ray.dies = True
    with (
        RayExecutor(partial(FakeWorker, tmp_path), num_workers=1, threads=1) as executor,
        pytest.raises(RunnerError, match=r"^root: lost with its .* 4 attempts \(No module named '"),
    ):
        list(executor.run([Task("root", "0", ("1",))]))
    assert fake_ray.actor_options["max_task_retries"] == 3
    assert fake_ray.actor_options["max_restarts"] == -1
