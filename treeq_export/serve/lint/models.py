"""Rules about one model: name, devices, library, versions, batch sizes, variants."""

from pathlib import Path

from treeq_export.serve.lint.read import Config, Remark, Remarks, enum_name, is_file
from treeq_served.settings import DENOISER, SAMPLER

MAX_DELAY_US = 200  # a bls sampler pays the denoiser's delay at every step
_CPU = "cpu"  # the variant for machines without a GPU


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


def instance_device(config: Config) -> Remarks:
    """Instances are on a device that the backend and the variant allow."""
    for group in config.message.instance_group:
        kind = enum_name(group, "kind")
        if config.variant == _CPU and kind == "KIND_GPU":
            yield config.remark(
                "instance_group: received KIND_GPU, expected KIND_CPU: this variant is for "
                "machines without a GPU, where the server refuses it. Write kind: KIND_CPU."
            )
        if config.backend == "tensorrt" and kind == "KIND_CPU" and config.variant != _CPU:
            yield config.remark(
                "instance_group: received KIND_CPU for a TensorRT engine, expected KIND_GPU: "
                "TensorRT runs on nothing else. Write kind: KIND_GPU."
            )


def op_library(config: Config) -> Remarks:
    """Libraries of custom operators are there and named absolutely."""
    for name in config.message.model_operations.op_library_filename:
        if not Path(name).is_absolute():
            yield config.remark(
                f'op_library_filename: received "{name}", expected an absolute path: the server '
                f"looks from the folder it is started in. Write {_found(config, name)}."
            )
        elif not is_file(config.folder.repository.locate(name)) or _is_of_a_copy(config, name):
            yield config.remark(
                f'op_library_filename: received "{name}", which is not there or in another copy '
                "of this repository, expected a library (`treeq-export serve --root` names where "
                f"it will lie). Write {_found(config, name)}."
            )


def _is_of_a_copy(config: Config, name: str) -> bool:
    """Whether a library is elsewhere although the model's folder has one of that name."""
    repository = config.folder.repository
    inside = Path(name).is_relative_to(repository.final_root)
    return not inside and bool(_of_that_name(config, name))


def _of_that_name(config: Config, name: str) -> list[Path]:
    """Return the files in the model's folder that have the name of a path."""
    return sorted(path for path in config.folder.path.rglob("*") if path.name == Path(name).name)


def _found(config: Config, name: str) -> str:
    """Return where in the model's folder a library of that name is, or what to do."""
    same = _of_that_name(config, name)
    return f'"{same[0]}"' if same else "the path of the library, or build it first"


def version_is_there(config: Config) -> Remarks:
    """There is at least one version."""
    if not config.folder.versions:
        yield Remark(config.folder.path, "received no version folder, expected 1/. Make it.")


def model_file(config: Config) -> Remarks:
    """The version that is served has its model file; without it a load may never return."""
    path = config.model_file
    if path is not None and not path.is_file():
        yield Remark(
            path,
            "received no such file, expected the model: a load of it fails, or never returns. "
            "Put it there.",
        )
    elif path is not None and path.stat().st_size == 0:
        yield Remark(path, "received an empty file, expected the model. Copy it again.")


def max_batch(config: Config) -> Remarks:
    """max_batch_size is at least 1: CUDA graphs never match with 0, nor can requests be merged."""
    size = config.message.max_batch_size
    if size < 1:
        yield config.remark(
            f"max_batch_size: received {size}, or none, expected 1 or more: with 0 nothing is "
            "batched and CUDA graphs never match. Write max_batch_size: 1, and dims without "
            "the batch axis."
        )


def batch_fits_profile(config: Config) -> Remarks:
    """The denoiser's largest batch is one that it was built for."""
    size = config.message.max_batch_size
    largest = config.folder.repository.profile.get("max", size)
    if config.folder.name == DENOISER and size > largest:
        yield config.remark(
            f"max_batch_size: received {size}, expected at most {largest}, the largest batch "
            f"of the model's profile (manifest.json). Write {largest}, or build with a "
            "larger profile."
        )


def queue_delay(config: Config) -> Remarks:
    """The denoiser of a bls sampler waits 0..200 us: the delay is paid at every step."""
    delay = config.message.dynamic_batching.max_queue_delay_microseconds
    if config.folder.name != DENOISER or delay <= MAX_DELAY_US:
        return
    sampler = config.sibling(SAMPLER)
    if sampler is not None and sampler.parameter("treeq_mode") == "bls":
        yield config.remark(
            f"dynamic_batching: received max_queue_delay_microseconds {delay}, expected "
            f"0..{MAX_DELAY_US}: the bls sampler waits that long at every step. "
            f"Write {MAX_DELAY_US} or less."
        )


def variant_is_same_model(config: Config) -> Remarks:
    """A variant has the name, inputs, outputs and batch of config.pbtxt: clients see one model."""
    main = config.folder.config("")
    if main is None or not config.variant:
        return
    for name in ("name", "max_batch_size", "input", "output"):
        if getattr(config.message, name) != getattr(main.message, name):
            yield config.remark(
                f"{name}: received another than in config.pbtxt, expected the same: a client has "
                f"to find the same model. Copy {name} from there."
            )
