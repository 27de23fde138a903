"""Finished builds by the digest of all that they depend on.

    CACHE/<key>/model.engine layers.txt entry.json

They are no results of one run's stage, because runs share them. A folder appears as a whole or not
at all, so that an interrupted build leaves nothing. Engines of a run are links to these files where
the file system has links, so that they take no space twice.
"""

from pathlib import Path
from typing import Literal

from treeq_export.artefacts import atomic_folder, digest_of, sha256_of_file
from treeq_export.engines.engine import (
    BUILD_FILE,
    ENGINE_FILE,
    LAYERS_FILE,
    BuildOrder,
    build_engine,
)
from treeq_export.errors import RunnerError
from treeq_export.progress import OnStep, Say, say_nothing
from treeq_export.reading import read_record
from treeq_export.records import Record, SealedRecord, save_record
from treeq_export.records.build import PluginReference, RuntimeName, ShapeRange

ENTRY_FILE = "entry.json"
BUILDER_VERSION = 1  # raise it when the builder's options change


class EngineInputs(Record):
    """All that an engine depends on.

    Attributes:
        graph_sha256: Digest of the ONNX file.
        data_sha256: Digest of its external data; None where it has none.
        runtime: "tensorrt" or "tensorrt-rtx".
        runtime_version: Version of the runtime.
        gpu: Architecture, for example "sm_89".
        profile: Shapes by input.
        plugins: Plugins with their versions.
        plugin_kind: A library has the plugins; no part of the key.
        kernels_sha256: None, since a library has the kernels; no part of the key.
        builder_version: Version of the builder's options.
    """

    graph_sha256: str
    data_sha256: str | None
    runtime: RuntimeName
    runtime_version: str
    gpu: str
    profile: dict[str, ShapeRange]
    plugins: list[PluginReference]
    plugin_kind: Literal["library"] = "library"
    kernels_sha256: None = None
    builder_version: int = BUILDER_VERSION

    @property
    def key(self) -> str:
        """Digest of everything."""
        constant = {"plugin_kind", "kernels_sha256"}
        return digest_of(**self.model_dump(mode="json", exclude=constant))


class CacheEntry(SealedRecord):
    """A finished build.

    Attributes:
        inputs: All that the build depends on.
        engine_sha256: Digest of the engine file.
        engine_bytes: Size of the engine file.
        layers_sha256: Digest of the layer list.
        build_s: Seconds of parsing and building.
        peak_bytes: Largest resident size of the building process.
        num_layers: Layers of the parsed network.
    """

    inputs: EngineInputs
    engine_sha256: str
    engine_bytes: int
    layers_sha256: str
    build_s: float
    peak_bytes: int
    num_layers: int


def read_entry(folder: Path) -> CacheEntry | None:
    """Return a cache folder's entry, None where there is none or it is damaged."""
    try:
        entry = read_record(folder / ENTRY_FILE, CacheEntry, error=RunnerError, remedy="")
    except RunnerError:
        return None
    return entry if entry.is_sealed() else None


def find(cache: Path, inputs: EngineInputs, say: Say = say_nothing) -> CacheEntry | None:
    """Return the finished build of these inputs; a damaged one is none, and `say` is told so."""
    folder = cache / inputs.key
    if not folder.is_dir():
        return None
    entry = read_entry(folder)
    if entry is not None and entry.inputs == inputs:
        digests = {ENGINE_FILE: entry.engine_sha256, LAYERS_FILE: entry.layers_sha256}
        if all(
            (folder / name).is_file() and sha256_of_file(folder / name) == digest
            for name, digest in digests.items()
        ):
            return entry
    say(f"{folder}: damaged, or of an older treeq-export; it is built again.")
    return None


def expected_seconds(cache: Path, inputs: EngineInputs) -> float | None:
    """Return how long the same graph took for another GPU or version; None if it never was."""
    found = [read_entry(path.parent) for path in cache.glob(f"*/{ENTRY_FILE}")]
    same = [e for e in found if e is not None and e.inputs.graph_sha256 == inputs.graph_sha256]
    return max((entry.build_s for entry in same), default=None)


def build_into(cache: Path, inputs: EngineInputs, order: BuildOrder, on_step: OnStep) -> CacheEntry:
    """Build and keep an engine.

    Args:
        cache: The cache's folder.
        inputs: All that the engine depends on.
        order: The same for the builder; its folder is replaced.
        on_step: Called with the fraction done, 0..1.

    Raises:
        RunnerError: The builder refuses the graph.
        OutputError: The cache cannot be written to.
    """
    with atomic_folder(cache / inputs.key, (ENGINE_FILE, LAYERS_FILE, ENTRY_FILE)) as folder:
        here = order.model_copy(update={"folder": str(folder.absolute())})
        result = build_engine(here, expected_seconds(cache, inputs), on_step)
        (folder / BUILD_FILE).unlink()
        engine = folder / ENGINE_FILE
        entry = CacheEntry(
            inputs=inputs,
            engine_sha256=sha256_of_file(engine),
            engine_bytes=engine.stat().st_size,
            layers_sha256=sha256_of_file(folder / LAYERS_FILE),
            **result.model_dump(),
        )
        save_record(folder / ENTRY_FILE, entry)
    return entry
