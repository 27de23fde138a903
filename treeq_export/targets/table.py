"""The table of all targets."""

from collections.abc import Iterable
from pathlib import Path

from treeq_export.errors import RecipeError
from treeq_export.run_folder import RunFolder
from treeq_export.runners.ort_runner import OrtRunner
from treeq_export.runners.ways import Way
from treeq_export.targets import fp32, ort, portable, tensorrt, tensorrt_native
from treeq_export.targets.target import Target

TARGETS: tuple[Target, ...] = (
    portable.TARGET,
    ort.TARGET,
    tensorrt.TARGET,
    tensorrt_native.TARGET,
    fp32.TARGET,
)


def target_named(name: str) -> Target:
    """Return a target.

    Raises:
        RecipeError: There is none of that name.
    """
    for target in TARGETS:
        if target.name == name:
            return target
    raise _unknown(name, (target.name for target in TARGETS))


def way_named(name: str) -> Way:
    """Return a way to run a target.

    Raises:
        RecipeError: There is none of that name.
    """
    ways = {way.name: way for target in TARGETS for way in target.ways}
    if name not in ways:
        raise _unknown(name, ways)
    return ways[name]


def different_ways(names: Iterable[str]) -> list[Way]:
    """Return the ways to run some targets that differ on this machine."""
    return [way for name in names for way in target_named(name).different_ways]


def open_way(run: Path, name: str, *, threads: int | None = None) -> OrtRunner:
    """Return the runner of a compiled graph.

    Args:
        run: The run folder.
        name: The way to run it.
        threads: Threads inside an operator; None lets ONNX Runtime choose.

    Raises:
        RecipeError: There is no such way.
    """
    way = way_named(name)
    return way.open(run / RunFolder.graph(way.target), threads=threads)


def _unknown(name: str, known: Iterable[str]) -> RecipeError:
    return RecipeError(f"target {name}: unknown. Choose one of {', '.join(known)}.")
