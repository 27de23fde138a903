"""The build stage: one engine per target and GPU, verified before it takes its final name.

    DIR/engines/<runtime>/<target>/<gpu>/model.engine manifest.json layers.json
    DIR/engines/cache/<key>/...                                    finished builds, verified or not
    DIR/build.json                                                 all engines of the run

An engine whose manifest has the right key, and whose file is the one it names, is up to date; so an
interrupted build goes on with the first unfinished engine.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from treeq_export import __version__
from treeq_export.artefacts import atomic_folder, link_or_copy, remove_stale, sha256_of_file
from treeq_export.engines.cache import CacheEntry, EngineInputs, build_into, find
from treeq_export.engines.engine import ENGINE_FILE, LAYERS_FILE, BuildOrder
from treeq_export.engines.graph_facts import GraphFacts, read_facts
from treeq_export.engines.layer_list import parse_layers
from treeq_export.engines.options import BuildOptions
from treeq_export.engines.verify import check, verify
from treeq_export.errors import PlanError, RunnerError
from treeq_export.plan import Plan, load_plan, plan_digest
from treeq_export.progress import OnStep, Say, say_nothing
from treeq_export.reading import read_record, read_text
from treeq_export.recipe import CompileSection
from treeq_export.records import save_record
from treeq_export.records.build import BuildRecord, BuiltEngine, EngineManifest, VerifierTable
from treeq_export.run_folder import RunFolder
from treeq_export.runners.engine_manifest import MANIFEST_FILE, read_manifest
from treeq_export.runners.tensorrt_library import Runtime, load_runtime, require_parser
from treeq_export.targets.names import ENGINES

TABLE_FILE = "layers.json"
How = Literal["built", "from cache", "up to date"]
# Opens a progress bar for an engine (name, whether it is skipped) and returns its callback.
OnEngine = Callable[[str, bool], OnStep]


@dataclass(frozen=True)
class _Source:
    """One compiled target of the run.

    Attributes:
        target: Name of the target.
        graph: The model file.
        facts: Facts of the graph that the verifier needs.
        graph_sha256: Digest of the model file.
        data_sha256: Digest of its external data; None where it has none.
        bits: Weight and activation bits by layer of the plan.
    """

    target: str
    graph: Path
    facts: GraphFacts
    graph_sha256: str
    data_sha256: str | None
    bits: Mapping[str, tuple[int, int]]


def run_build(
    run: Path,
    options: BuildOptions,
    section: CompileSection,
    on_engine: OnEngine,
    say: Say = say_nothing,
) -> BuildRecord:
    """Build every engine that is not up to date, and write `build.json`.

    Args:
        run: The run folder, with compiled graphs.
        options: Engines to build.
        section: The recipe's compile section, for graphs without a profile.
        on_engine: Called at the start of every engine.
        say: Told in one line that a finished build is damaged.

    Returns:
        All engines of the run whose manifest is there, those of this call first.

    Raises:
        RecipeError: An unknown name.
        PlanError: A graph is missing, or of another plan.
        RunnerError: The runtime is missing, cannot build for a GPU, or refuses a graph.
        CompileError: An engine does not obey the plan; it is not kept.
    """
    options.check()
    runtime = load_runtime(options.runtime)
    require_parser(runtime)
    plan = load_plan(run)
    cache = options.cache or run / RunFolder.ENGINES / "cache"
    done: list[BuiltEngine] = []
    for target in _choose_targets(run, options):
        source = _read_source(run, target, plan, section)
        for gpu in options.gpus:
            done.append(_build_one(run, source, runtime, gpu, cache, on_engine, say))
            save_record(run / RunFolder.BUILD, BuildRecord(engines=_with_earlier(run, done)))
    return BuildRecord(engines=_with_earlier(run, done))


def _choose_targets(run: Path, options: BuildOptions) -> tuple[str, ...]:
    compiled = tuple(name for name in ENGINES if (run / RunFolder.graph(name)).is_file())
    targets = options.targets or compiled
    missing = [target for target in targets if target not in compiled]
    if missing or not targets:
        names = ", ".join(missing or ENGINES)
        raise PlanError(
            f"{run}: {names} is not compiled. Add it to compile.targets in the recipe and run "
            f"`treeq-export run RECIPE --out {run}`, or `treeq-export compile --run {run}` where "
            "the recipe has it already."
        )
    return targets


def _read_source(run: Path, target: str, plan: Plan, section: CompileSection) -> _Source:
    """Read a compiled target and check that it belongs to the plan.

    Raises:
        PlanError: It belongs to another plan.
    """
    graph = run / RunFolder.graph(target)
    facts = read_facts(graph, section.max_batch, section.opt_batch)
    if facts.plan_sha256 != plan_digest(plan):
        raise PlanError(
            f"{graph}: compiled from another plan than {run / 'plan.json'}. "
            f"Run `treeq-export compile --run {run}` again."
        )
    data = graph.with_name(f"{graph.name}.data")
    return _Source(
        target=target,
        graph=graph,
        facts=facts,
        graph_sha256=sha256_of_file(graph),
        data_sha256=sha256_of_file(data) if data.is_file() else None,
        bits={layer.name: (layer.weight.bits, layer.activation.bits or 0) for layer in plan.layers},
    )


def _build_one(
    run: Path,
    source: _Source,
    runtime: Runtime,
    gpu: str,
    cache: Path,
    on_engine: OnEngine,
    say: Say,
) -> BuiltEngine:
    """Build one engine, or take it from the run or the cache.

    Raises:
        RunnerError: The builder refuses the graph.
        CompileError: The engine does not obey the plan.
    """
    inputs = EngineInputs(
        graph_sha256=source.graph_sha256,
        data_sha256=source.data_sha256,
        runtime=runtime.name,
        runtime_version=runtime.version,
        gpu=gpu,
        profile=source.facts.profile,
        plugins=list(source.facts.plugins),
    )
    folder = run / RunFolder.engine(runtime.name, source.target, gpu)
    for parent in (cache, folder.parent):  # nothing may be left to write there
        remove_stale(parent)
    path, name = str(folder.relative_to(run)), f"{source.target} {gpu}"
    current = _read_current(folder, inputs.key, say)
    if current is not None:
        on_engine(name, True)
        return BuiltEngine(path=path, how="up to date", manifest=current)
    on_step = on_engine(name, False)
    how: How = "from cache"
    entry = find(cache, inputs, say)
    if entry is None:
        how = "built"
        order = BuildOrder(
            runtime=runtime.name,
            gpu=gpu,
            graph=str(source.graph.absolute()),
            profile=inputs.profile,
            folder="",
        )
        entry = build_into(cache, inputs, order, on_step)
    manifest = _place(folder, cache / inputs.key, entry, source)
    on_step(1.0)
    return BuiltEngine(path=path, how=how, manifest=manifest)


def _place(folder: Path, cached: Path, entry: CacheEntry, source: _Source) -> EngineManifest:
    """Verify a finished build and give it its place in the run.

    Raises:
        CompileError: It does not obey the plan.
    """
    remedy = f"Remove {cached} and run `treeq-export build` again."
    text = read_text(cached / LAYERS_FILE, error=RunnerError, remedy=remedy)
    table: VerifierTable = verify(source.facts, parse_layers(text), source.bits)
    check(str(folder), table)
    inputs = entry.inputs
    manifest = EngineManifest(
        treeq_version=__version__,
        runtime=inputs.runtime,
        runtime_version=inputs.runtime_version,
        gpu=inputs.gpu,
        target=source.target,
        key=inputs.key,
        engine_sha256=entry.engine_sha256,
        engine_bytes=entry.engine_bytes,
        graph_sha256=source.graph_sha256,
        data_sha256=source.data_sha256,
        plan_sha256=source.facts.plan_sha256,
        profile=inputs.profile,
        bits=dict(source.bits),
        plugins=inputs.plugins,
        build_s=round(entry.build_s, 3),
        peak_bytes=entry.peak_bytes,
        verifier=table.summary,
    )
    with atomic_folder(folder, (ENGINE_FILE, TABLE_FILE, MANIFEST_FILE)) as temporary:
        link_or_copy(cached / ENGINE_FILE, temporary / ENGINE_FILE)
        save_record(temporary / TABLE_FILE, table)
        save_record(temporary / MANIFEST_FILE, manifest)
    return manifest


def _read_current(folder: Path, key: str, say: Say) -> EngineManifest | None:
    """Return the manifest of an engine that is up to date."""
    if not (folder / MANIFEST_FILE).is_file():
        return None
    manifest = None
    try:
        manifest = read_manifest(folder)
        if manifest.key != key:
            return None
        table = read_record(folder / TABLE_FILE, VerifierTable, error=RunnerError, remedy="")
        digest = sha256_of_file(folder / ENGINE_FILE)
        whole = manifest.engine_sha256 == digest and table.is_sealed()
    except (OSError, RunnerError):
        whole = False
    if whole:
        return manifest
    say(f"{folder}: damaged, or of an older treeq-export; it is made again.")
    return None


def _with_earlier(run: Path, done: list[BuiltEngine]) -> list[BuiltEngine]:
    """Return these engines, and what build.json lists beside them and is still there."""
    mine = {engine.path for engine in done}
    try:
        record = read_record(run / RunFolder.BUILD, BuildRecord, error=PlanError, remedy="")
        earlier = record.engines
    except PlanError:  # none yet
        earlier = []
    return done + [
        engine
        for engine in earlier
        if engine.path not in mine and (run / engine.path / MANIFEST_FILE).is_file()
    ]
