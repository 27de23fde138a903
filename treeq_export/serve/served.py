"""What a repository says, gathered from the run: the graph or engine, the sampler's settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from treeq_export import __version__
from treeq_export.environment import runtime_version, version_of
from treeq_export.errors import PlanError, RunnerError, ServeError, TreeqError
from treeq_export.model.zoo import Denoiser
from treeq_export.recipe import Recipe
from treeq_export.records.build import EngineManifest
from treeq_export.run_folder import RunFolder
from treeq_export.runners.cpu_kernels import ORT_LIBRARY, find_library
from treeq_export.runners.engine_manifest import ENGINE_FILE, MANIFEST_FILE, read_manifest
from treeq_export.runners.model_files import DATA_FILE, model_files
from treeq_export.runners.ort_runner import check_version
from treeq_export.runners.tensorrt_runner import PLUGIN_LIBRARY
from treeq_export.serve.options import USUAL_BATCH, ServeOptions
from treeq_export.serve.tensors import ServedGraph, read_graph
from treeq_export.serve.vae import Vae, open_vae
from treeq_export.targets.table import way_named
from treeq_served.denoise import is_pixels, unpacked_shape
from treeq_served.settings import (
    DENOISER,
    ONNXRUNTIME,
    SAMPLER,
    VAE_DECODER,
    NetworkSettings,
    SamplerSettings,
)

_LOOP_PACKAGES = ("torch", "diffusers")


@dataclass(frozen=True)
class Served:
    """Everything that is written, before it is written.

    Attributes:
        name: The run's name.
        options: The choices of the person who serves.
        graph: Inputs and outputs.
        network_file: The graph or engine of the run.
        network_files: That file and its external data, each with its SHA-256 as compile or build
            wrote it down; None where nobody did.
        engine: Manifest of the engine; None where a graph is served.
        library: Library of custom ops or plugins; None where none is needed or none exists.
        profile: Batch sizes "min", "opt" and "max" that the denoiser takes.
        settings: Settings of the sampler, for version 1.
        vae: The decoder of latents; None where there is none.
    """

    name: str
    options: ServeOptions
    graph: ServedGraph
    network_file: Path
    network_files: Mapping[Path, str | None]
    engine: EngineManifest | None
    library: Path | None
    profile: dict[str, int]
    settings: SamplerSettings
    vae: Vae | None

    @property
    def max_batch(self) -> int:
        """Most rows of a request or a merged batch."""
        return self.settings.network.max_batch

    @property
    def warmup_batches(self) -> list[int]:
        """The batch sizes of the profile that the server may meet, ascending."""
        return sorted({min(batch, self.max_batch) for batch in self.profile.values()})

    @property
    def sampler_warmup_batches(self) -> list[int]:
        """The smallest and the largest batch."""
        return sorted({1, self.max_batch})

    @property
    def default_guidance(self) -> float:
        """The guidance of a request that names none."""
        embedded = self.settings.embedded_guidance
        return self.settings.guidance_scale if embedded is None else embedded

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one sample, unpacked, as the decoder takes it."""
        return unpacked_shape(self.settings.sample_shape)

    @property
    def image_shape(self) -> list[int] | None:
        """(height, width, channels); None where only latents are served."""
        channels, height, width = self.latent_shape
        if self.settings.image == "pixels":
            return [height, width, channels]
        if self.vae is None:
            return None
        return [height * self.vae.factor, width * self.vae.factor, self.vae.channels]

    @property
    def backend_version(self) -> str:
        """Version of the runtime that the repository is written for."""
        if self.engine is None:
            return _known(ONNXRUNTIME, runtime_version())
        return self.engine.runtime_version

    @property
    def packages(self) -> dict[str, dict[str, str]]:
        """Python packages that each model's process imports, with their versions here."""
        network = (
            {ONNXRUNTIME: self.backend_version}
            if self.engine is None
            else {"treeq-export": __version__, self.engine.runtime: self.backend_version}
        )
        loop = {package: _known(package, version_of(package)) for package in _LOOP_PACKAGES}
        found = {SAMPLER: loop | (network if self.options.mode == "inprocess" else {})}
        if self.options.chosen_backend == "python":
            found[DENOISER] = network
        if self.vae is not None:
            found[VAE_DECODER] = loop
        return found

    @property
    def merged_packages(self) -> dict[str, str]:
        """Python packages of all models."""
        return dict(item for model in self.packages.values() for item in model.items())

    @property
    def models(self) -> list[str]:
        """Names of the models of the repository."""
        return [DENOISER, SAMPLER, *([] if self.vae is None else [VAE_DECODER])]

    @property
    def loaded(self) -> list[str]:
        """Models to load at start: in mode inprocess the sampler has a denoiser of its own."""
        return [model for model in self.models if model != DENOISER or self.options.mode == "bls"]


def gather(
    run: Path,
    denoiser: Denoiser,
    recipe: Recipe,
    options: ServeOptions,
    compiled: Mapping[str, str] | None = None,
) -> Served:
    """Read all that a repository needs.

    Args:
        run: The run folder, with the compiled target or the built engine.
        denoiser: The network's wrapper, for shapes and conventions; its weights are not used.
        recipe: The recipe, of which the name, sampler and compile sections are read.
        options: The choices of the person who serves.
        compiled: SHA-256 of the files that compile wrote, relative to the run folder.

    Raises:
        ServeError: Something is missing or does not fit.
        RunnerError: The custom-op library is of another version.
    """
    options.check()
    graph_file = run / RunFolder.graph(options.target)
    graph = read_graph(graph_file)
    if graph.has_block_products and options.chosen_backend == "onnxruntime":
        raise ServeError(
            f"--backend onnxruntime: {options.target} has layers of 4-bit weights and "
            "floating-point activations, which Triton's ONNX Runtime backend quantizes to 8 bits, "
            "and no setting of it prevents that. Choose --backend python, or --target ort."
        )
    engine_folder = _find_engine(run, options) if options.is_engine else None
    engine, files = None, _graph_files(run, graph_file, compiled)
    if engine_folder is not None:
        engine = _read_engine(engine_folder, options)
        _check_engine_source(engine_folder, engine, graph_file, files)
        files = {engine_folder / ENGINE_FILE: engine.engine_sha256}
    profile = _read_profile(engine, recipe)
    max_batch = options.max_batch or min(USUAL_BATCH, profile["max"])
    if max_batch > profile["max"]:
        raise ServeError(
            f"--max-batch {max_batch}: {options.target} takes at most {profile['max']} "
            "rows. Set compile.max_batch in the recipe and compile again, or ask for less."
        )
    vae = None if options.vae is None else open_vae(options.vae, denoiser.sample_shape)
    library = _find_library(options, engine)
    return Served(
        name=recipe.name,
        options=options,
        graph=graph,
        network_file=graph_file if engine_folder is None else engine_folder / ENGINE_FILE,
        network_files=files,
        engine=engine,
        library=library,
        profile=profile,
        settings=_make_settings(
            denoiser,
            recipe,
            options,
            network=NetworkSettings(
                model=DENOISER,
                runtime=ONNXRUNTIME if engine is None else engine.runtime,
                file=network_path(options, 1),
                library=None if library is None else f"lib/{library.name}",
                inputs={tensor.name: tensor.dtype for tensor in graph.inputs},
                output=graph.output.name,
                max_batch=max_batch,
                gpu=None if engine is None else engine.gpu,
                threads=options.threads,
                fold_constants=way_named(options.target).options(graph_file)["fold_constants"],
            ),
            has_vae=vae is not None,
        ),
        vae=vae,
    )


def network_path(options: ServeOptions, version: int) -> str:
    """Return where a version's graph or engine lies in the denoiser's folder."""
    if not options.is_engine:
        return f"{version}/model.onnx"
    return f"{version}/{'model.plan' if options.chosen_backend == 'tensorrt' else ENGINE_FILE}"


def _find_engine(run: Path, options: ServeOptions) -> Path:
    folder = run / RunFolder.engine(options.runtime, options.target)
    gpus = sorted(path.name for path in folder.glob("sm_*") if (path / ENGINE_FILE).is_file())
    build = f"Run `treeq-export build --run {run} --runtime {options.runtime} --gpu GPU` first"
    if options.gpu is not None and options.gpu not in gpus:
        there = f"there is {', '.join(gpus)}" if gpus else "there is none"
        raise ServeError(f"{folder}: no engine for {options.gpu}; {there}. {build}.")
    if not gpus:
        raise ServeError(f"{folder}: no engine. {build}.")
    if options.gpu is None and len(gpus) > 1:
        raise ServeError(f"{folder}: engines for {', '.join(gpus)}. Choose one with --gpu.")
    return folder / (options.gpu or gpus[0])


def _graph_files(
    run: Path, graph_file: Path, compiled: Mapping[str, str] | None
) -> dict[Path, str | None]:
    """Return a graph and its external data with their digests."""
    if compiled is None:
        return dict.fromkeys(model_files(graph_file))
    folder = graph_file.parent
    return {
        run / name: digest
        for name, digest in compiled.items()
        if run / name in (graph_file, folder / DATA_FILE)
    }


def _read_engine(folder: Path, options: ServeOptions) -> EngineManifest:
    """Return an engine's manifest.

    Raises:
        ServeError: It says that it is another engine, or lacks what a server needs of it.
        RunnerError: It is malformed.
    """
    manifest = read_manifest(folder)
    for name, found, expected in (
        ("runtime", manifest.runtime, options.runtime),
        ("target", manifest.target, options.target),
        ("gpu", manifest.gpu, folder.name),
    ):
        if found != expected:
            raise ServeError(
                f"{folder / MANIFEST_FILE}: {name}: received {found}, expected {expected}. "
                "Build the engine again with `treeq-export build`."
            )
    if "sample" not in manifest.profile:
        raise ServeError(
            f"{folder / MANIFEST_FILE}: profile: received no input sample, expected its shapes. "
            "Build the engine again with `treeq-export build`."
        )
    return manifest


def _check_engine_source(
    folder: Path, engine: EngineManifest, graph_file: Path, files: Mapping[Path, str | None]
) -> None:
    """Check that an engine was built of the graph as compile wrote it.

    Raises:
        ServeError: It was not.
    """
    data = graph_file.with_name(DATA_FILE)
    built = {graph_file: engine.graph_sha256, data: engine.data_sha256}
    if any(digest not in (None, built[file]) for file, digest in files.items()):
        raise ServeError(
            f"{folder}: built of another graph than {graph_file}. Run `treeq-export build` again."
        )


def not_as_recorded(file: Path, served: Served) -> TreeqError:
    """Return the error for a graph or engine whose bytes are not those that were written down."""
    if served.engine is None:
        run = file.parents[2]
        return PlanError(
            f"{file}: not the file that compile wrote. "
            f"Run `treeq-export compile --run {run}` first."
        )
    run, engine = file.parents[4], served.engine
    return ServeError(
        f"{file}: not the file that {MANIFEST_FILE} names. Run `treeq-export build --run {run} "
        f"--runtime {engine.runtime} --gpu {engine.gpu} --target {engine.target}` again."
    )


def _read_profile(engine: EngineManifest | None, recipe: Recipe) -> dict[str, int]:
    """Return the batch sizes of an engine's profile, or of the recipe."""
    if engine is None:
        section = recipe.compile
        return {"min": 1, "opt": section.opt_batch, "max": section.max_batch}
    shapes = engine.profile["sample"]
    return {"min": shapes.min[0], "opt": shapes.opt[0], "max": shapes.max[0]}


def _find_library(options: ServeOptions, engine: EngineManifest | None) -> Path | None:
    """Return the library that the denoiser's backend has to load."""
    if engine is None:
        library = find_library(ORT_LIBRARY) if way_named(options.target).uses_kernels else None
        if library is not None:
            check_version(library)
        return library
    if not engine.plugins or options.chosen_backend == "python":
        return None
    library = options.plugin_library or find_library(PLUGIN_LIBRARY)
    if library is None or not library.is_file():
        raise ServeError(
            f"{library or PLUGIN_LIBRARY}: not found, and the engine needs its plugins. "
            "kernels/README.md says how to build it; then name it with --plugin-library."
        )
    return library


def _make_settings(
    denoiser: Denoiser,
    recipe: Recipe,
    options: ServeOptions,
    *,
    network: NetworkSettings,
    has_vae: bool,
) -> SamplerSettings:
    null = denoiser.null_conditioning(1)
    text = {} if denoiser.num_classes else denoiser.row_shapes
    pixels = is_pixels(denoiser.sample_shape)
    if pixels and has_vae:
        raise ServeError("--vae: this model paints pixels itself. Leave it out.")
    return SamplerSettings(
        network=network,
        scheduler=recipe.sampler.definition,
        steps=recipe.sampler.steps,
        guidance_scale=recipe.sampler.guidance_scale,
        sample_shape=list(denoiser.sample_shape),
        prediction_channels=denoiser.sample_shape[0] if denoiser.may_learn_sigma else None,
        num_classes=denoiser.num_classes or None,
        conditioning={name: list(shape) for name, shape in text.items()},
        null={name: float(null[name].flatten()[0]) for name in denoiser.row_shapes},
        embedded_guidance=denoiser.constants.get("guidance"),
        image="pixels" if pixels else ("vae" if has_vae else None),
        concurrency=options.concurrency,
    )


def _known(package: str, version: str | None) -> str:
    """Return a version without its local part.

    Raises:
        RunnerError: The package is not installed here, so that its version is not known.
    """
    if version is None:
        raise RunnerError(
            f"{package}: not installed. `treeq-export doctor` says how to install it."
        )
    return version.split("+")[0]
