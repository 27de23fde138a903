"""Build one engine in a process of its own, watch it, and say in one line how it ended."""

import os
import selectors
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from treeq_export.children import python_child
from treeq_export.engines.progress import estimate
from treeq_export.errors import RunnerError
from treeq_export.progress import OnStep
from treeq_export.reading import parse_record, read_record
from treeq_export.records import Record
from treeq_export.records.build import ShapeRange
from treeq_export.runners.engine_manifest import ENGINE_FILE as ENGINE_FILE
from treeq_export.runners.tensorrt_library import RuntimeName

LAYERS_FILE = "layers.txt"
BUILD_FILE = "build.json"
_CHILD = "treeq_export.engines.child"
_POLL_S = 0.5


class BuildOrder(Record):
    """What the child builds.

    Attributes:
        runtime: "tensorrt" or "tensorrt-rtx".
        gpu: Architecture, for example "sm_89".
        graph: Path of the ONNX file.
        profile: Shapes by input.
        folder: Folder for engine, layer list and result.
    """

    runtime: RuntimeName
    gpu: str
    graph: str
    profile: dict[str, ShapeRange]
    folder: str


class BuildResult(Record):
    """What the child says of a finished build.

    Attributes:
        build_s: Seconds of parsing and building.
        peak_bytes: Largest resident size of the child.
        num_layers: Layers of the parsed network.
    """

    build_s: float
    peak_bytes: int
    num_layers: int


class Message(Record):
    """A line of the child's output.

    Attributes:
        fraction: Done fraction of the build, 0..1.
        error: Why it ended.
    """

    fraction: float | None = None
    error: str | None = None


def build_engine(order: BuildOrder, expected_s: float | None, on_step: OnStep) -> BuildResult:
    """Build an engine.

    Args:
        order: The engine and its folder.
        expected_s: Seconds that such a build took before, for the progress; None is not known.
        on_step: Called with the fraction done, 0..1.

    Returns:
        Time and memory.

    Raises:
        RunnerError: The builder refuses the graph, or its process ends without an engine.
    """
    with (
        tempfile.TemporaryFile("w+") as stderr,
        python_child(
            _CHILD,
            order.model_dump_json(),
            cwd=order.folder,
            stdout=subprocess.PIPE,
            stderr=stderr,
        ) as child,
    ):
        error = _watch(child, expected_s, on_step)
        status = child.wait()
        result = Path(order.folder) / BUILD_FILE
        if status or not result.is_file():
            stderr.seek(0)
            raise RunnerError(error or _describe_end(order, status, stderr.read()))
        built = read_record(result, BuildResult, error=RunnerError, remedy="Build again.")
    on_step(1.0)
    return built


def _watch(
    child: "subprocess.Popen[bytes]",
    expected_s: float | None,
    on_step: OnStep,
) -> str | None:
    """Report progress until the child closes its output; return its error, if any."""
    assert child.stdout is not None
    started = time.monotonic()
    fraction, error, rest = 0.0, None, b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            if selector.select(_POLL_S):
                data = os.read(child.stdout.fileno(), 1 << 16)
                if not data:
                    return error
                *lines, rest = (rest + data).split(b"\n")
                for message in map(_read_line, lines):
                    fraction = fraction if message.fraction is None else message.fraction
                    error = message.error or error
            on_step(estimate(fraction, time.monotonic() - started, expected_s))


def _read_line(line: bytes) -> Message:
    where = "the builder's progress"
    return parse_record(line or b"{}", Message, where, error=RunnerError, remedy="Build again.")


def _describe_end(order: BuildOrder, status: int, stderr: str) -> str:
    """Return why a child ended without a word of its own."""
    where = f"{order.graph}: {order.runtime} for {order.gpu}"
    if status == -signal.SIGKILL:
        return (
            f"{where}: the builder was killed, most likely for want of memory. "
            "Close other programs, or build on a machine with more."
        )
    lines = stderr.strip().splitlines() or ["no message"]
    if status < 0:
        name = signal.Signals(-status).name
        return (
            f"{where}: the builder crashed ({name}): {lines[-1].strip()[:200]} Compile the graph "
            "again with this treeq-export; if it stays, report it with the graph."
        )
    return (
        f"{where}: the builder ended with status {status}: {lines[-1].strip()[:200]} "
        "`treeq-export doctor` shows what is missing."
    )
