"""The manifest beside an engine: a mismatch is refused before the runtime sees the file.

An engine holds names of plugins and code for one GPU and one version of its runtime. The runtime's
own messages about a mismatch are long and late, some are none at all; these are one line.
"""

from pathlib import Path

from treeq_export.artefacts import sha256_of_file
from treeq_export.errors import RunnerError
from treeq_export.reading import read_record
from treeq_export.records.build import EngineManifest
from treeq_export.runners.cuda_bindings import load_driver
from treeq_export.runners.tensorrt_library import Runtime

ENGINE_FILE = "model.engine"
MANIFEST_FILE = "manifest.json"


def own_gpu() -> str | None:
    """Return the architecture of this machine's first GPU, such as "sm_89"; None without one."""
    try:
        driver = load_driver()
        if int(driver.cuInit(0)[0]) or not driver.cuDeviceGetCount()[1]:
            return None
        attribute = driver.CUdevice_attribute
        major, minor = (
            int(driver.cuDeviceGetAttribute(which, 0)[1])
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
    except (RunnerError, RuntimeError):  # no cuda-python, or no driver library
        return None
    return f"sm_{major}{minor}"


def read_manifest(folder: Path) -> EngineManifest:
    """Read an engine's manifest.

    Raises:
        RunnerError: Missing or malformed.
    """
    remedy = "Build the engine again with `treeq-export build`."
    path = folder / MANIFEST_FILE
    manifest = read_record(path, EngineManifest, error=RunnerError, remedy=remedy)
    if manifest.sha256 and not manifest.is_sealed():  # those of earlier versions have no digest
        raise RunnerError(f"{path}: not what build wrote. {remedy}")
    return manifest


def check_manifest(folder: Path, runtime: Runtime, *, gpu: str | None = None) -> EngineManifest:
    """Check that an engine may be loaded here.

    Args:
        folder: The engine's folder.
        runtime: What will load it, with our plugins registered.
        gpu: GPU that will run it, such as "sm_89"; None asks the driver.

    Returns:
        The manifest.

    Raises:
        RunnerError: Another runtime, version or GPU, a changed file, or a missing plugin; says what
            to do.
    """
    manifest = read_manifest(folder)
    again = (
        f"Run `treeq-export build --runtime {runtime.name} --gpu {gpu or manifest.gpu}` "
        "for its run again"
    )
    if manifest.runtime != runtime.name:
        raise RunnerError(
            f"{folder}: built for {manifest.runtime}, received {runtime.name}. {again}."
        )
    if manifest.runtime_version != runtime.version:
        raise RunnerError(
            f"{folder}: built with {runtime.name} {manifest.runtime_version}, received "
            f"{runtime.version}. {again}, or "
            f"`pip install {runtime.name}=={manifest.runtime_version}`."
        )
    _check_gpu(folder, manifest, gpu or own_gpu(), runtime)
    _check_file(folder, manifest, again)
    registry = runtime.module.get_plugin_registry()
    for plugin in manifest.plugins:
        if registry.get_creator(plugin.name, plugin.version, plugin.namespace) is None:
            raise RunnerError(
                f"{folder}: needs the plugin {plugin.namespace}::{plugin.name} version "
                f"{plugin.version}, which is not registered. Load libtreeq_plugins.so, or call "
                "treeq_export.runners.tensorrt_plugin.register_plugins."
            )
    return manifest


def _check_gpu(folder: Path, manifest: EngineManifest, gpu: str | None, runtime: Runtime) -> None:
    if gpu is None:
        raise RunnerError(
            f"{folder}: built for {manifest.gpu}, but this machine has no NVIDIA GPU. "
            "`treeq-export doctor` shows what is found."
        )
    if gpu != manifest.gpu:
        raise RunnerError(
            f"{folder}: built for {manifest.gpu}, but the GPU is {gpu}. Run `treeq-export build "
            f"--runtime {runtime.name} --gpu {gpu}` for its run."
        )


def _check_file(folder: Path, manifest: EngineManifest, again: str) -> None:
    path = folder / ENGINE_FILE
    if not path.is_file():
        raise RunnerError(f"{path}: missing. {again}.")
    if path.stat().st_size != manifest.engine_bytes or (
        sha256_of_file(path) != manifest.engine_sha256
    ):
        raise RunnerError(f"{path}: not the file that {MANIFEST_FILE} names. {again}.")
