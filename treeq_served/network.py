"""The denoiser in a model's own process."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeq_served.ort_session import open_session
from treeq_served.settings import ONNXRUNTIME, NetworkSettings

Arrays = Mapping[str, NDArray[Any]]
Run = Callable[[Arrays], NDArray[Any]]


def open_network(models: Path, settings: NetworkSettings) -> Run:
    """Open a denoiser.

    Args:
        models: The repository.
        settings: The denoiser.

    Returns:
        Inputs by name, each with the same number of rows -> output; more rows than max_batch are
        several calls.
    """
    folder = models / settings.model
    run = (
        _open_graph(folder, settings)
        if settings.runtime == ONNXRUNTIME
        else _open_engine(folder, settings)
    )
    return lambda inputs: run_in_batches(run, inputs, settings)


def run_in_batches(run: Run, inputs: Arrays, settings: NetworkSettings) -> NDArray[Any]:
    """Call a denoiser with at most max_batch rows at a time, each input in its type."""
    feeds = {name: inputs[name].astype(kind, copy=False) for name, kind in settings.inputs.items()}
    num = len(next(iter(feeds.values())))
    parts = [
        run({name: array[start : start + settings.max_batch] for name, array in feeds.items()})
        for start in range(0, num, settings.max_batch)
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _open_graph(folder: Path, settings: NetworkSettings) -> Run:
    session = open_session(
        folder / settings.file,
        None if settings.library is None else folder / settings.library,
        threads=settings.threads,
        fold_constants=settings.fold_constants,
    )
    return lambda inputs: session.run([settings.output], dict(inputs))[0]


def _open_engine(folder: Path, settings: NetworkSettings) -> Run:
    """Open an engine; its runner belongs to treeq-export, and lives as long as the process."""
    from treeq_export.runners.tensorrt_runner import TensorrtRunner

    engine = folder / settings.file
    links = Path(tempfile.mkdtemp(prefix="treeq-engine-"))
    (links / "model.engine").symlink_to(engine)
    (links / "manifest.json").symlink_to(engine.with_name("engine.json"))
    runtime: Any = settings.runtime
    runner = TensorrtRunner(links, runtime, gpu=settings.gpu)
    runner.__enter__()
    return lambda inputs: runner.run_all(inputs)[settings.output]
