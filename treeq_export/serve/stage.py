"""Writing a Triton repository, or the next version into one that is there.

    DIR/triton/denoiser sampler vae_decoder/   config.pbtxt configs/cpu.pbtxt lib/ 1/ 2/ ...
    DIR/triton/launch.sh check_manifest.py manifest.json README.md

A repository is written under a temporary name, linted, and exchanged with the old one, of which all
that serve did not write is kept (others.py). A new version is written beside the old ones, each
folder under a name that Triton does not look at, and renamed. manifest.json says before that which
version is being written and lists it at last, so that a kill leaves version folders that no model
will load and the next addition replaces.

What is copied from the run is compared, as it lies in the repository, with what compile or build
wrote down of it.
"""

import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import treeq_served
from treeq_export import __version__
from treeq_export.artefacts import atomic_folder, remove_stale, sha256_of_file
from treeq_export.errors import OutputError, ServeError
from treeq_export.model.zoo import Denoiser
from treeq_export.progress import OnStep
from treeq_export.reading import read_text
from treeq_export.recipe import Recipe
from treeq_export.records import save_record
from treeq_export.records.serve import ServedFile, ServeManifest
from treeq_export.run_folder import RunFolder
from treeq_export.serve.configs import render, render_configs
from treeq_export.serve.lint import check_repository
from treeq_export.serve.options import ServeOptions, check_place
from treeq_export.serve.others import (
    CHECK_FILE,
    LAUNCH_FILE,
    MANIFEST_FILE,
    README_FILE,
    find_repository,
    keep_others,
    read_manifest,
)
from treeq_export.serve.served import (
    DENOISER,
    SAMPLER,
    VAE_DECODER,
    Served,
    gather,
    network_path,
    not_as_recorded,
)
from treeq_served.settings import SETTINGS_FILE, to_json

_CODE = Path(treeq_served.__path__[0])


@dataclass(frozen=True)
class ServedRepository:
    """A written repository.

    Attributes:
        root: The repository's folder.
        version: The version that was written.
        manifest: The repository's manifest.
        served: The source of the files.
    """

    root: Path
    version: int
    manifest: ServeManifest
    served: Served


def run_serve(
    run: Path,
    denoiser: Denoiser,
    recipe: Recipe,
    options: ServeOptions,
    *,
    out: Path | None = None,
    compiled: Mapping[str, str] | None = None,
    on_step: OnStep = lambda _: None,
) -> ServedRepository:
    """Write a repository for a run, or add a version.

    Args:
        run: The run folder.
        denoiser: The network's wrapper, for shapes and conventions.
        recipe: The run's recipe.
        options: The choices of the person who serves.
        out: The repository; None is DIR/triton.
        compiled: SHA-256 of the files that compile wrote, relative to the run folder; None takes
            the files as they are.
        on_step: Called with the fraction done, 0..1.

    Raises:
        ServeError: Something is missing, does not fit, or is not right by the lint.
        PlanError: A file is not the one that compile wrote.
        OutputError: The folder cannot be written to, or holds what serve did not write.
    """
    root = (out or run / RunFolder.TRITON).absolute()
    check_place(options.root or root)
    remove_stale(root.resolve().parent)  # puts back a repository that a killed process moved away
    old = None if options.add_version else find_repository(root)
    served = gather(run, denoiser, recipe, options, compiled)
    on_step(0.1)
    if options.add_version:
        return _add_version(root, served, on_step)
    final = options.root or root
    with atomic_folder(root.resolve()) as temporary:
        _write_shared(temporary, final, served)
        for model in served.models:
            _write_version(temporary / model / "1", model, served, 1)
        on_step(0.5)
        manifest = _make_manifest(
            temporary, final, served, models={model: [1] for model in served.models}
        )
        save_record(temporary / MANIFEST_FILE, manifest)
        on_step(0.9)
        check_repository(temporary, final)
        if old is not None:
            keep_others(root, temporary, old, manifest)
    on_step(1.0)
    return ServedRepository(root, 1, manifest, served)


def _write_shared(folder: Path, final: Path, served: Served) -> None:
    """Write what all versions share."""
    for name, text in render_configs(served, final).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if served.options.mode == "inprocess" and served.settings.image != "vae":
        warmup = folder / SAMPLER / "warmup"
        warmup.mkdir()
        (warmup / "one").write_bytes(struct.pack("<i", 1))
        (warmup / "guidance").write_bytes(struct.pack("<f", served.default_guidance))
    if served.library is not None:
        library = folder / DENOISER / "lib" / served.library.name
        library.parent.mkdir(parents=True)
        shutil.copyfile(served.library, library)
    launch = folder / LAUNCH_FILE
    launch.write_text(render("launch.sh", served))
    launch.chmod(0o755)
    (folder / README_FILE).write_text(render("README.md", served))
    shutil.copyfile(_CODE / CHECK_FILE, folder / CHECK_FILE)


def _write_version(folder: Path, model: str, served: Served, version: int) -> None:
    """Write one version of one model."""
    folder.mkdir(parents=True, exist_ok=True)
    network = replace(served.settings.network, file=network_path(served.options, version))
    if model == DENOISER:
        _copy_network(folder, served)
        if served.options.chosen_backend != "python":
            return
        (folder / SETTINGS_FILE).write_text(to_json(network))
    if model == SAMPLER:
        (folder / SETTINGS_FILE).write_text(to_json(replace(served.settings, network=network)))
    if model == VAE_DECODER and served.vae is not None:
        (folder / "vae").mkdir()
        for name, file in served.vae.files.items():
            shutil.copyfile(file, folder / "vae" / name)
    (folder / "model.py").write_text(render("model.py", served, model=model))
    (folder / _CODE.name).mkdir()
    for source in sorted(_CODE.glob("*.py")):
        shutil.copyfile(source, folder / _CODE.name / source.name)


def _copy_network(folder: Path, served: Served) -> None:
    """Put the graph or the engine into the denoiser's version."""
    name = Path(network_path(served.options, 1)).name
    for source, digest in served.network_files.items():
        copy = folder / (name if source == served.network_file else source.name)
        shutil.copyfile(source, copy)
        if digest is not None and sha256_of_file(copy) != digest:
            raise not_as_recorded(source, served)
    if served.engine is not None:
        save_record(folder / "engine.json", served.engine)


def _make_manifest(
    folder: Path,
    final: Path,
    served: Served,
    *,
    models: dict[str, list[int]],
    before: ServeManifest | None = None,
) -> ServeManifest:
    """Return the manifest of a folder that holds what has just been written and nothing else.

    Args:
        folder: The repository; if there is one before, only the last version is looked at.
        final: The repository's place on the server.
        served: The files' source.
        models: Versions by model.
        before: The manifest that a version is added to.
    """
    options = served.options
    version = str(max(models[SAMPLER]))
    new = models if before is None else [f"{model}/{version}" for model in models]
    engine = served.engine
    return ServeManifest(
        treeq_version=__version__,
        name=served.name,
        plan_sha256=(before.plan_sha256 if before else {}) | {version: served.graph.plan_sha256},
        target=options.target,
        mode=options.mode,
        backend=options.chosen_backend,
        backend_version=served.backend_version,
        root=str(final) if options.chosen_backend == "onnxruntime" and served.library else None,
        gpu=None if engine is None else engine.gpu,
        denoiser=ServeManifest.Denoiser(profile=served.profile),
        models=models,
        packages=served.packages,
        files=(before.files if before else {})
        | {
            str(path.relative_to(folder)): ServedFile(
                bytes=path.stat().st_size, sha256=sha256_of_file(path)
            )
            for path in sorted(path for part in new for path in (folder / part).rglob("*"))
            if path.is_file()
        },
    )


def _add_version(root: Path, served: Served, on_step: OnStep) -> ServedRepository:
    """Add the next version of every model to a repository.

    Raises:
        ServeError: There is no repository, or it differs in more than the weights.
        OutputError: A folder of the new version is there and somebody else's.
    """
    old = read_manifest(root)
    final = served.options.root or root
    _check_same_configs(root, final, served)
    version = old.pending or 1 + max(n for numbers in old.models.values() for n in numbers)
    folders = {model: root / model / str(version) for model in served.models}
    for folder in folders.values():
        if old.pending is None and folder.exists():
            raise OutputError(
                f"{folder}: is there and not in {MANIFEST_FILE}, expected a new version. "
                "Move it elsewhere."
            )
    save_record(root / MANIFEST_FILE, old.model_copy(update={"pending": version}))
    for model, folder in folders.items():
        with atomic_folder(folder) as temporary:
            _write_version(temporary, model, served, version)
    on_step(0.5)
    models = {model: [*old.models[model], version] for model in served.models}
    manifest = _make_manifest(root, final, served, models=models, before=old)
    check_repository(root, final)
    save_record(root / MANIFEST_FILE, manifest)
    on_step(1.0)
    return ServedRepository(root, version, manifest, served)


def _check_same_configs(root: Path, final: Path, served: Served) -> None:
    """Check that a new version has the inputs, outputs and libraries of those that are there."""
    remedy = "A server cannot exchange that under load; write a new repository with another --out."
    for name, text in render_configs(served, final).items():
        path = root / name
        if not path.is_file() or read_text(path, error=ServeError, remedy=remedy) != text:
            raise ServeError(f"{path}: would change (inputs, batch or library). {remedy}")
    if served.library is not None:
        library = root / DENOISER / "lib" / served.library.name
        if not library.is_file() or sha256_of_file(library) != sha256_of_file(served.library):
            raise ServeError(f"{library}: the new version needs another file. {remedy}")
