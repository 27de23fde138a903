"""More than a hundred kills with signal 9, over all of what serve, build, compare and run do.

A command is killed before one of the changes that it makes to files and names; then it runs again.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.commands import LEAST_WORK, Driver, Outcome
from tests.test_interruption import is_complete
from treeq_export.artefacts import is_workplace, sha256_of_file
from treeq_export.sealed import SEAL

pytestmark = pytest.mark.slow

# How often a scene is killed at a change: the first, the last, and others evenly between.
KILLS = {
    "serve": 13,
    "serve over": 13,
    "serve --add-version": 16,
    "build": 10,
    "build over": 10,
    "compare": 8,
    "compare more": 8,
    "run": 8,
    "run compile": 8,
    "run evaluate": 8,
}
# How often a folder is replaced by two renamings where the system cannot exchange names.
GAPS = {"serve over": 1, "build over": 2, "run compile": 2}
VOLATILE = ("how", "seconds")  # keys in JSON files that differ after a kill, or from run to run
REPORTED = ("model", "plan", "parity", "quality", "size")  # sections of report.json without times
NOTES = "notes.txt"  # of an operator
PENDING = "triton/manifest.json"  # of which --add-version writes two
ENGINE = Path("run/engines/tensorrt-rtx/tensorrt/sm_89")

# Files of a command that differ from run to run: they hold times, or are an engine or name one.
VARYING: dict[str, set[str]] = {
    "serve": set(),
    "build": {"model.engine", "entry.json", "manifest.json", "build.json"},
    "compare": {"run.json", "compare.json", "compare.html"},
    "run": {"run.json", "bench.json", "report.html", "search.json"},
}
# Files that a command writes more than once until it ends, or removes.
GROWING = {"plan.json", "compare.png", "finetune.state.safetensors"}

Contents = dict[str, str]
Args = tuple[object, ...]


@dataclass(frozen=True)
class Given:
    """What scenes start from."""

    driver: Driver
    recipe: Path
    finished: Path
    folder: Path

    def run(self, *args: object) -> None:
        outcome = self.driver.run(*args)
        assert outcome.status == 0, outcome.stderr

    def compiled(self) -> Path:
        """Return the folder of a run that is compiled for TensorRT."""
        run = self.folder / "run"
        if not run.is_dir():
            self.run("run", self.recipe, "--out", run, "--set", "compile.targets=[ort,tensorrt]")
        return run


def add_notes(*folders: Path) -> None:
    """Leave an operator's file in folders that the command replaces or writes into."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / NOTES).write_text(f"of {folder.name}")


def set_serve(given: Given, place: Path) -> Args:
    add_notes(place)
    return ("serve", "--run", given.finished, "--out", place / "triton")


def set_serve_over(given: Given, place: Path) -> Args:
    args = set_serve(given, place)
    given.run(*args, "--no-dynamic-batching")
    triton = place / "triton"
    add_notes(triton, triton / "other" / "1", triton / "denoiser", triton / "sampler" / "1")
    return args


def set_add_version(given: Given, place: Path) -> Args:
    args = set_serve(given, place)
    given.run(*args)
    add_notes(place / "triton", place / "triton" / "denoiser" / "lib")
    return (*args, "--add-version")


def set_build(given: Given, place: Path) -> Args:
    shutil.copytree(given.compiled(), place / "run")
    add_notes(place / ENGINE)
    words = "--runtime tensorrt-rtx --gpu sm_89 --target tensorrt"
    return ("build", "--run", place / "run", *words.split())


def set_build_over(given: Given, place: Path) -> Args:
    """An engine of other inputs lies there, and the cache's entry is damaged."""
    args = set_build(given, place)
    given.run(*args)
    manifest = place / ENGINE / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"key": "0" * 64}))
    [entry] = (place / "run" / "engines" / "cache").iterdir()
    with (entry / "layers.txt").open("a") as layers:
        layers.write("x")
    add_notes(entry)
    return args


def set_compare(given: Given, place: Path) -> Args:
    add_notes(place / "table")
    words = "--budgets 3 --strategies uniform --finetune peft --seeds 0"
    settings = (word for setting in LEAST_WORK for word in ("--set", setting))
    return ("compare", given.recipe, "--out", place / "table", *words.split(), *settings)


def set_compare_more(given: Given, place: Path) -> Args:
    args = set_compare(given, place)
    given.run(*args)
    return tuple("4" if arg == "3" else arg for arg in args)


def set_run(given: Given, place: Path) -> Args:
    add_notes(place / "run" / "onnx")
    return ("run", given.recipe, "--out", place / "run")


def set_run_compile(given: Given, place: Path) -> Args:
    shutil.copytree(given.finished, place / "run")
    add_notes(place / "run" / "onnx" / "ort", place / "run" / "samples")
    return ("run", given.recipe, "--out", place / "run", "--set", "compile.max_batch=4")


def set_run_evaluate(given: Given, place: Path) -> Args:
    shutil.copytree(given.finished, place / "run")
    add_notes(place / "run" / "samples")
    return ("run", given.recipe, "--out", place / "run", "--set", "evaluate.num_samples=3")


SCENES = {
    "serve": set_serve,
    "serve over": set_serve_over,
    "serve --add-version": set_add_version,
    "build": set_build,
    "build over": set_build_over,
    "compare": set_compare,
    "compare more": set_compare_more,
    "run": set_run,
    "run compile": set_run_compile,
    "run evaluate": set_run_evaluate,
}


def read_contents(place: Path) -> Contents:
    """Return the digest of every file, without temporaries."""
    return {
        str(path.relative_to(place)): digest(path)
        for path in sorted(place.rglob("*"))
        if path.is_file()
        and path.name != ".lock"
        and not any(is_workplace(parent) for parent in path.parents)
    }


def digest(path: Path) -> str:
    """Return the digest of what a file says, without times and the order of its header."""
    content = path.read_bytes()
    if path.suffix == ".json" and is_complete(path):
        value = json.loads(content)
        if path.name == "report.json":
            value = {name: value[name] for name in REPORTED}
        content = json.dumps(without_volatile(value)).encode()
    if path.suffix == ".safetensors" and is_complete(path):
        # Its header has names in any order, and the seal among them is over the header too.
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            metadata = {**(file.metadata() or {}), SEAL: ""}
        content = repr(sorted(metadata.items())).encode()
        for name, tensor in tensors.items():
            content += f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.tobytes()
    return hashlib.sha256(content).hexdigest()


def digest_pending(manifest: Path) -> str:
    """Return the digest of a manifest while a version is added."""
    value = json.loads(manifest.read_text()) | {"pending": 2}
    return hashlib.sha256(json.dumps(without_volatile(value)).encode()).hexdigest()


def without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_volatile(v) for name, v in value.items() if name not in VOLATILE}
    return [without_volatile(v) for v in value] if isinstance(value, list) else value


def is_whole(path: Path) -> bool:
    """Whether a file can be read to its end, and an engine is the one of its manifest or entry."""
    if path.name != "model.engine":
        return is_complete(path)
    records = [path.with_name(name) for name in ("manifest.json", "entry.json")]
    [record] = [json.loads(record.read_text()) for record in records if record.is_file()]
    return record["engine_sha256"] == sha256_of_file(path)


@dataclass
class Scene:
    """A command on its mark: the state before it, and what it makes of that undisturbed."""

    place: Path
    start: Path
    args: Args
    driver: Driver
    before: Contents
    between: Contents  # what is there for a while
    after: Contents = field(default_factory=dict)
    again: Contents = field(default_factory=dict)  # after the command has run twice
    num_changes: int = 0

    def reset(self) -> None:
        shutil.rmtree(self.place)
        shutil.copytree(self.start, self.place, symlinks=True)

    def run(self, on: str = "change", count: int = 0, *, exchange: bool = True) -> Outcome:
        trap = {"below": str(self.place), "on": on, "count": count, "exchange": exchange}
        return self.driver.run(*self.args, trap=trap)

    @property
    def varying(self) -> set[str]:
        return VARYING[str(self.args[0])]

    @property
    def states(self) -> tuple[Contents, ...]:
        return (self.before, self.between, self.after, self.again)

    @property
    def kept(self) -> set[str]:
        """What is never missing. `run` removes outputs of stages that have to be done again."""
        both = self.before.keys() & self.after.keys()
        return {name for name in both if self.args[0] != "run" or Path(name).name == NOTES}

    def known(self, name: str) -> set[str | None]:
        return {state.get(name) for state in self.states}

    def find_damage(self, now: Contents) -> list[str]:
        """Return the files that are neither the old nor the new ones."""
        return [
            name
            for name, value in now.items()
            if value not in self.known(name)
            and not (Path(name).name in self.varying | GROWING and is_whole(self.place / name))
        ]

    def differences(self, now: Contents, expected: Contents) -> list[str]:
        """Return the files that are in one state only, or in both with another content."""
        return [
            name
            for name in {**now, **expected}
            if (name in now) != (name in expected)
            or (Path(name).name not in self.varying and now[name] != expected[name])
        ]


@pytest.fixture(scope="module")
def make_scene(
    driver: Driver,
    run_recipe: Path,
    finished_run: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Scene]:
    """A function: name -> the scene."""
    given = Given(driver, run_recipe, finished_run, tmp_path_factory.mktemp("given"))

    @cache
    def make(name: str) -> Scene:
        folder = tmp_path_factory.mktemp("scene").resolve()
        place, start = folder / "place", folder / "start"
        place.mkdir()
        args = SCENES[name](given, place)
        between = {}
        if name == "serve --add-version":
            between[PENDING] = digest_pending(place / PENDING)
        shutil.copytree(place, start, symlinks=True)
        scene = Scene(place, start, args, driver, read_contents(place), between)
        undisturbed: list[Outcome] = []
        states: list[Contents] = []
        for is_fresh in (True, True, False):
            if is_fresh:
                scene.reset()
            undisturbed.append(scene.run())
            states.append(read_contents(place))
        assert [outcome.status for outcome in undisturbed] == [0] * 3, undisturbed
        scene.num_changes = undisturbed[0].changes
        other, scene.after, scene.again = states
        notes = {name for name in scene.before if Path(name).name == NOTES}
        assert notes
        assert all(state.get(note) == scene.before[note] for state in states for note in notes)
        assert scene.differences(other, scene.after) == []
        return scene

    return make


def check_kill(scene: Scene, killed: Outcome, *, exchanged: bool) -> None:
    assert killed.status == -9, killed.stderr
    now = read_contents(scene.place)
    assert scene.find_damage(now) == []
    if exchanged:
        assert [name for name in scene.kept if name not in now] == []
    is_done = scene.differences(now, scene.after) == []
    second = scene.run()
    assert second.status == 0, second.stderr
    final = read_contents(scene.place)
    assert scene.differences(final, scene.again if is_done else scene.after) == []
    assert scene.find_damage(final) == []
    assert [path for path in scene.place.parent.rglob("*") if is_workplace(path)] == []


def spread(kills: dict[str, int]) -> list[Any]:
    return [
        pytest.param(name, index, id=f"{name}-{index}")
        for name, count in kills.items()
        for index in range(count)
    ]


def test_there_are_a_hundred() -> None:
    assert sum(KILLS.values()) + sum(GAPS.values()) >= 100


@pytest.mark.parametrize(("name", "index"), spread(KILLS))
def test_a_kill_at_a_change(make_scene: Callable[[str], Scene], name: str, index: int) -> None:
    scene = make_scene(name)
    scene.reset()
    assert scene.num_changes >= KILLS[name]
    killed = scene.run("change", 1 + index * (scene.num_changes - 1) // (KILLS[name] - 1))
    check_kill(scene, killed, exchanged=True)


@pytest.mark.parametrize(("name", "index"), spread(GAPS))
def test_a_kill_between_two_renamings(
    make_scene: Callable[[str], Scene], name: str, index: int
) -> None:
    scene = make_scene(name)
    scene.reset()
    killed = scene.run("gap", 1 + index, exchange=False)
    check_kill(scene, killed, exchanged=False)
