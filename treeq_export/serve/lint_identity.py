"""Rules about what a model is: its file's form, name, backend, instances and libraries."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from treeq_export.serve.inside.check_manifest import find_unfit
from treeq_export.serve.lint_read import (
    BACKEND_OF_PLATFORM,
    CPU,
    MAIN,
    Config,
    Remark,
    Remarks,
    Repository,
    enum_name,
)

_LOADS_MODELS = re.compile(r"--model-control-mode[= ]\"?(explicit|poll)")
_ALL_ADDRESSES = re.compile(r"0\.0\.0\.0|\[?::\]?(?![\da-f])")
_ENVIRONMENT = "EXECUTION_ENV_PATH"
_MODEL_FOLDER = "$$TRITON_MODEL_DIRECTORY"


def folder_is_model(repository: Repository) -> Remarks:
    """Every folder of the root is a model: a server that loads all does not start otherwise."""
    for path in repository.strangers:
        yield Remark(
            path,
            f"received a folder without {MAIN} and without a version, expected models only: with "
            "--load-model=* the server takes it for a model and does not start. Move it elsewhere.",
        )


def config_is_there(repository: Repository) -> Remarks:
    """Every model has a config.pbtxt; Triton guesses one, without any batching."""
    for folder in repository.folders.values():
        if not (folder.path / MAIN).is_file():
            yield Remark(
                folder.path,
                f"received no {MAIN}, expected one: Triton makes one up. Write one, or run "
                "`treeq-export serve` again.",
            )


def schema(repository: Repository) -> Remarks:
    """Every configuration is text that Triton's schema accepts."""
    for folder in repository.folders.values():
        for path, problem in folder.unread:
            yield Remark(path, f"{problem} The server does not load the model. Correct this place.")


def manifest_is_readable(repository: Repository) -> Remarks:
    """manifest.json is JSON, and the batch sizes in it are in order."""
    if repository.manifest_error:
        yield Remark(
            repository.root / "manifest.json",
            f"{repository.manifest_error} Run `treeq-export serve` again.",
        )


def path_is_fit(repository: Repository) -> Remarks:
    """The repository lies where Triton's Python backend can start a model's process."""
    configs = (config for folder in repository.folders.values() for config in folder.configs)
    unfit = find_unfit(repository.final_root)
    if unfit is not None and any(config.backend == "python" for config in configs):
        yield Remark(repository.root, unfit)


def launch_is_guarded(repository: Repository) -> Remarks:
    """launch.sh does not offer loading of models to all the network."""
    path = repository.root / "launch.sh"
    if not path.is_file():
        return
    text = path.read_text(errors="replace")
    commands = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    if not _LOADS_MODELS.search(commands) or "restricted-" in commands:
        return
    for protocol in ("http", "grpc"):
        address = re.search(rf"--{protocol}-address[= ](\S+)", commands)
        if address is None or _ALL_ADDRESSES.search(address[1]):
            yield Remark(
                path,
                f"received --{protocol}-address {'none' if address is None else address[1]}, with "
                "model control by API, expected an address of your own: whoever reaches the port "
                "may load models, which can be code. Name 127.0.0.1, or restrict the API by "
                "--http-restricted-api and --grpc-restricted-protocol.",
            )


def key_is_unique(config: Config) -> Remarks:
    """No map names a key twice; Triton keeps the last one without a word."""
    for place, key in _repeated_keys(config.listed):
        yield config.remark(
            f'{place}: received key "{key}" more than once, expected once: Triton takes the last '
            "one. Remove the others."
        )


def _repeated_keys(message: Any, place: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        name = f"{place}.{descriptor.name}" if place else descriptor.name
        children = value if descriptor.is_repeated else [value]
        if descriptor.message_type.name.endswith("Entry"):
            counts = Counter(str(child.key) for child in children)
            found += [(name, key) for key, count in counts.items() if count > 1]
        for child in children:
            found += _repeated_keys(child, name)
    return found


def name_is_folder(config: Config) -> Remarks:
    """`name` is stated and is the folder's."""
    name, folder = config.message.name, config.folder.name
    if not name:
        yield config.remark(
            f'name: received none, expected "{folder}", the folder\'s: Triton would serve a copy '
            f'of this folder under the copy\'s name. Write name: "{folder}".'
        )
    elif name != folder:
        yield config.remark(
            f'name: received "{name}", expected "{folder}", the folder\'s: the server refuses any '
            f'other. Write name: "{folder}".'
        )


def backend_is_named(config: Config) -> Remarks:
    """There is a backend, or a platform that Triton knows."""
    platform = config.message.platform
    if config.message.backend or platform in BACKEND_OF_PLATFORM:
        return
    known = ", ".join(BACKEND_OF_PLATFORM)
    if platform:
        yield config.remark(
            f'platform: received "{platform}", expected one of {known}. Write one of these, or '
            "a backend instead."
        )
    else:
        yield config.remark(
            "backend: received neither a backend nor a platform, expected one: Triton guesses it "
            f'from the files. Write backend: "python", or a platform of {known}.'
        )


def platform_fits_backend(config: Config) -> Remarks:
    """Backend and platform, where both are named, belong together."""
    backend, platform = config.message.backend, config.message.platform
    if not backend or not platform:
        return
    wanted = BACKEND_OF_PLATFORM.get(platform)
    if wanted is None and backend not in BACKEND_OF_PLATFORM.values():
        return  # a backend of its own may have platforms of its own
    if backend != wanted:
        belongs = f'backend "{wanted}"' if wanted else "no backend"
        expected = f"expected {belongs}" if wanted is not None else "expected another platform"
        yield config.remark(
            f'platform: received "{platform}" with backend "{backend}", {expected}. Remove the '
            "one that is wrong."
        )


def instance_count(config: Config) -> Remarks:
    """Every instance group says how many instances it has."""
    for group in config.message.instance_group:
        if group.count < 1:
            yield config.remark(
                f"instance_group: received count {group.count}, or none, expected 1 or more: "
                "Triton takes its own default, which on a CPU is 2 for onnxruntime. "
                "Write count: 1."
            )


def instance_device(config: Config) -> Remarks:
    """Instances are on a device that the backend, the variant and the kind allow."""
    on_cpu = config.variant == CPU
    for group in config.message.instance_group:
        kind, gpus = enum_name(group, "kind"), list(group.gpus)
        if on_cpu and kind == "KIND_GPU":
            yield config.remark(
                "instance_group: received KIND_GPU, expected KIND_CPU: this variant is for "
                "machines without a GPU, where the server refuses it. Write kind: KIND_CPU."
            )
        elif gpus and (on_cpu or kind in ("KIND_CPU", "KIND_MODEL")):
            yield config.remark(
                f"instance_group: received gpus {gpus} for {kind}, expected none: the server "
                "refuses them. Remove gpus."
            )
        if config.backend == "tensorrt" and kind == "KIND_CPU" and not on_cpu:
            yield config.remark(
                "instance_group: received KIND_CPU for a TensorRT engine, expected KIND_GPU: "
                "TensorRT runs on nothing else. Write kind: KIND_GPU."
            )


def instance_profile(config: Config) -> Remarks:
    """Optimization profiles are numbers, and only TensorRT has them."""
    for group in config.message.instance_group:
        profiles = list(group.profile)
        if profiles and config.backend != "tensorrt":
            yield config.remark(
                f'instance_group: received profile {profiles} for backend "{config.backend}", '
                "expected none: only TensorRT has profiles. Remove profile."
            )
        elif not all(profile.isdecimal() for profile in profiles):
            yield config.remark(
                f"instance_group: received profile {profiles}, expected numbers of the engine's "
                'profiles. Write for instance profile: ["0"].'
            )


def execution_environment(config: Config) -> Remarks:
    """The packed environment of a Python model is there."""
    given = config.parameter(_ENVIRONMENT)
    if given is None or config.backend != "python" or "://" in given:
        return
    path = config.folder.repository.locate(given.replace(_MODEL_FOLDER, str(config.folder.path), 1))
    if path.is_absolute() and not path.exists():
        yield config.remark(
            f'parameters: received {_ENVIRONMENT} "{given}", which is not there, expected a packed '
            "environment. Make it with conda-pack, or remove the parameter."
        )


def op_library(config: Config) -> Remarks:
    """Libraries of custom operators are there, named absolutely, and of use to the backend."""
    for name in config.message.model_operations.op_library_filename:
        if config.is_ensemble or config.backend in ("python", "tensorrt"):
            what = "an ensemble" if config.is_ensemble else f'backend "{config.backend}"'
            yield config.remark(
                f'op_library_filename: received "{name}" for {what}, which ignores it, expected '
                "none. Remove it; TensorRT's plugins are an option of the server: "
                "--backend-config=tensorrt,plugins=PATH."
            )
        elif not Path(name).is_absolute():
            yield config.remark(
                f'op_library_filename: received "{name}", expected an absolute path: the server '
                f"looks from the folder it is started in. Write {_found(config, name)}."
            )
        elif not config.folder.repository.locate(name).is_file() or _is_of_a_copy(config, name):
            yield config.remark(
                f'op_library_filename: received "{name}", which is not there or in another copy '
                "of this repository, expected a library (`treeq-export serve --root` names where "
                f"it will lie). Write {_found(config, name)}."
            )


def _is_of_a_copy(config: Config, name: str) -> bool:
    """Whether a library is elsewhere although the model's folder has one of that name."""
    repository = config.folder.repository
    inside = Path(name).is_relative_to(repository.final_root)
    return not inside and any(config.folder.path.rglob(Path(name).name))


def _found(config: Config, name: str) -> str:
    """Return where in the model's folder a library of that name is, or what to do."""
    same = sorted(config.folder.path.rglob(Path(name).name))
    return f'"{same[0]}"' if same else "the path of the library, or build it first"
