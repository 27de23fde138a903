"""The process that builds one engine: `python -m treeq_export.engines.child ORDER`.

A process of its own, because the parser and the builder may abort, and so that their memory is
measured and given back. ORDER is JSON (see `engine.BuildOrder`). Lines of JSON go to stdout:
{"fraction": f} while it works and {"error": text} if it fails. It leaves model.engine, layers.txt
and build.json in the order's folder.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from treeq_export.children import take_stdout
from treeq_export.engines.engine import (
    BUILD_FILE,
    ENGINE_FILE,
    LAYERS_FILE,
    BuildOrder,
    BuildResult,
)
from treeq_export.engines.layer_list import HEADER
from treeq_export.engines.progress import Phases
from treeq_export.environment import read_peak_bytes
from treeq_export.errors import RunnerError, TreeqError
from treeq_export.reading import parse_record
from treeq_export.runners.tensorrt_library import Runtime, load_runtime, require_parser
from treeq_export.runners.tensorrt_plugin import register_plugins

_REPORT_EVERY_S = 0.2
_ERRORS_SHOWN = 2


class Channel:
    """Lines of JSON to the parent; what libraries print goes to stderr."""

    def __init__(self) -> None:
        self._file = take_stdout()
        self._last = 0.0

    def send(self, **message: Any) -> None:
        """Send one message."""
        self._file.write(json.dumps(message) + "\n")
        self._file.flush()

    def report(self, fraction: float) -> None:
        """Send how far the build is, now and then."""
        now = time.monotonic()
        if now - self._last >= _REPORT_EVERY_S:
            self._last = now
            self.send(fraction=round(fraction, 4))


def make_logger(trt: Any) -> Any:
    """Return a logger that keeps errors and the layer list of all that the builder says."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            elif message.startswith(HEADER):
                self.layers += message

    return Logger()


def make_monitor(trt: Any, channel: Channel) -> Any:
    """Return a progress monitor that reports to the parent."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases = Phases()

        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            self.phases.start(name, parent, num_steps)

        def phase_finish(self, name: str) -> None:
            self.phases.finish(name)

        def step_complete(self, name: str, step: int) -> bool:
            self.phases.step(name, step)
            channel.report(self.phases.fraction)
            return True

    return Monitor()


def build(order: BuildOrder, runtime: Runtime, channel: Channel) -> None:
    """Parse, build, and leave the result in the order's folder.

    Raises:
        RunnerError: The graph is not parsed, or no engine is built.
    """
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(runtime.name == "tensorrt-rtx"))
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath, Profile
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    trt = runtime.module
    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    logger = make_logger(trt)
    # What its loaders give to builder and parser.
    vars(importlib.import_module("polygraphy.backend.trt.util"))["TRT_LOGGER"] = logger
    profile = Profile()
    for name, shapes in order.profile.items():
        profile.add(name, tuple(shapes.min), tuple(shapes.opt), tuple(shapes.max))
    started = time.monotonic()
    try:
        network = NetworkFromOnnxPath(order.graph, strongly_typed=True)()
        num_layers = network[1].num_layers
        config = _make_config(order, runtime, profile, make_monitor(trt, channel))
        engine = EngineBytesFromNetwork(network, config=config)()
    except PolygraphyException as error:
        reasons = list(dict.fromkeys(logger.errors))[:_ERRORS_SHOWN] or [str(error)]
        raise RunnerError(
            f"{order.graph}: {runtime.name} {runtime.version} builds no engine for {order.gpu}: "
            f"{' '.join(reasons)} Compile it again with this treeq-export."
        ) from error
    build_s = time.monotonic() - started
    folder = Path(order.folder)
    (folder / ENGINE_FILE).write_bytes(memoryview(engine))
    (folder / LAYERS_FILE).write_text(logger.layers or _inspect(trt, logger, engine))
    result = BuildResult(build_s=build_s, peak_bytes=read_peak_bytes(), num_layers=num_layers)
    (folder / BUILD_FILE).write_text(result.model_dump_json())


def _make_config(order: BuildOrder, runtime: Runtime, profile: Any, monitor: Any) -> Any:
    trt = runtime.module
    options = {
        "profiles": [profile],
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "progress_monitor": monitor,
    }
    if runtime.name == "tensorrt-rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        number = order.gpu.removeprefix("sm_")
        capability = (int(number[:-1]), int(number[-1]))
        return CreateConfigRTX(compute_capabilities=[capability], **options)
    from polygraphy.backend.trt import CreateConfig

    return CreateConfig(**options)


def _inspect(trt: Any, logger: Any, engine: Any) -> str:
    """Return the layers by the engine inspector, which needs the engine's GPU."""
    loaded = trt.Runtime(logger).deserialize_cuda_engine(engine)
    if loaded is None:
        raise RunnerError("the engine cannot be loaded again to read its layers.")
    inspector = loaded.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def main(text: str) -> int:
    """Carry out an order; return the exit status."""
    channel = Channel()
    try:
        order = parse_record(
            text, BuildOrder, "the order", error=RunnerError, remedy="Build again."
        )
        runtime = load_runtime(order.runtime)
        require_parser(runtime)
        register_plugins(runtime)
        build(order, runtime, channel)
    except TreeqError as error:
        channel.send(error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
