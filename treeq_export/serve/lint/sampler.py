"""Rules about the sampler, and how denoiser and decoder belong to it."""

import math
from collections.abc import Callable
from typing import Any

from treeq_export.serve.lint.read import Config, Remarks, enum_name
from treeq_served.settings import DENOISER, SAMPLER, VAE_DECODER

_MODES = ("inprocess", "bls")
_REQUEST_INPUTS = {
    "label": "TYPE_INT32",
    "seed": "TYPE_INT64",
    "steps": "TYPE_INT32",
    "guidance": "TYPE_FP32",
    "preview_every": "TYPE_INT32",
}
_NUM_CHANNELS = (1, 3)
_PREDICTION = "prediction"
_LABELS = ("TYPE_INT32", "TYPE_INT64")
# Inputs that a bls sampler passes by itself, beside the text inputs.
_PASSED = {"sample", "timestep", "class_labels", "guidance"}


def _is_count(text: str) -> bool:
    return text.isdecimal() and int(text) >= 1


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


_VALUES: dict[str, tuple[Callable[[str], bool], str]] = {
    "treeq_num_classes": (_is_count, "a number of classes"),
    "treeq_steps": (_is_count, "a number of steps"),
    "treeq_guidance": (_is_finite, "a finite number"),
}


def _describe(tensor: Any) -> tuple[str, list[int]]:
    return enum_name(tensor, "data_type"), list(tensor.dims)


def sampler_parameters(config: Config) -> Remarks:
    """A sampler says its mode, its model's name, and defaults that clients can read."""
    if config.folder.name != SAMPLER:
        return
    mode = config.parameter("treeq_mode")
    if mode not in _MODES:
        yield config.remark(
            f'parameters: received treeq_mode "{mode or ""}", expected {" or ".join(_MODES)}. '
            'Write string_value: "inprocess".'
        )
    if not config.parameter("treeq_model"):
        yield config.remark(
            "parameters: received no treeq_model, expected the name of what is sampled. Write it."
        )
    for key, (is_right, expected) in _VALUES.items():
        value = config.parameter(key)
        if value is not None and not is_right(value):
            yield config.remark(
                f'parameters: received {key} "{value}", expected {expected}. Correct it.'
            )
    has_label = "label" in config.tensors("input")
    if has_label != (config.parameter("treeq_num_classes") is not None):
        received, missing = "input label", "treeq_num_classes"
        if not has_label:
            received, missing = missing, received
        yield config.remark(
            f"parameters: received {received} without {missing}, expected both or neither: "
            "clients read the range of labels there. Write both."
        )


def sampler_inputs(config: Config) -> Remarks:
    """A sampler takes a seed, a label or text, and these have the types that clients send."""
    if config.folder.name != SAMPLER:
        return
    inputs = config.tensors("input")
    if "seed" not in inputs:
        yield config.remark(
            'input "seed": received none, expected TYPE_INT64, dims [1]: an image is made from '
            "its seed. Add it."
        )
    if ("label" in inputs) == bool(inputs.keys() - _REQUEST_INPUTS):
        yield config.remark(
            f"input: received {', '.join(sorted(inputs))}, expected either label or the "
            "denoiser's text inputs. Correct the inputs."
        )
    for name, tensor in inputs.items():
        received, dims = _describe(tensor)
        expected = _REQUEST_INPUTS.get(name, "TYPE_FP32")
        if received != expected or (name in _REQUEST_INPUTS and dims != [1]):
            shape = f"{expected}, dims [1]" if name in _REQUEST_INPUTS else expected
            yield config.remark(
                f'input "{name}": received {received}, dims {dims}, expected {shape}. Write that.'
            )


def sampler_outputs(config: Config) -> Remarks:
    """A sampler returns latents, an image of 8 bits, or both."""
    if config.folder.name != SAMPLER:
        return
    outputs = config.tensors("output")
    if not outputs.keys() & {"latents", "image"}:
        yield config.remark(
            f"output: received {', '.join(sorted(outputs)) or 'none'}, expected latents, image or "
            "both. Add one."
        )
    if "image" in outputs:
        kind, dims = _describe(outputs["image"])
        if kind != "TYPE_UINT8" or len(dims) != 3 or dims[2] not in _NUM_CHANNELS:
            yield config.remark(
                f'output "image": received {kind}, dims {dims}, expected TYPE_UINT8, dims '
                "[height, width, 1 or 3]: clients write it as a picture. Write that."
            )


def sampler_fits_denoiser(config: Config) -> Remarks:
    """A bls sampler has a denoiser that takes what it passes and returns a prediction."""
    if config.parameter("treeq_mode") != "bls":
        return
    if DENOISER not in config.folder.repository.folders:
        yield config.remark(
            f"parameters: received treeq_mode bls without a model {DENOISER} beside it, expected "
            'one. Add it, or write treeq_mode "inprocess".'
        )
    denoiser = config.sibling(DENOISER)
    if denoiser is None:
        return
    yield from _compare_inputs(config, denoiser.tensors("input"))
    outputs = denoiser.tensors("output")
    if _PREDICTION not in outputs:
        yield config.remark(
            f"{DENOISER}: received outputs {', '.join(sorted(outputs)) or 'none'}, expected "
            f'"{_PREDICTION}": a bls sampler asks for it. Name the output so.'
        )


def _compare_inputs(config: Config, taken: dict[str, Any]) -> Remarks:
    """Compare the inputs that a bls sampler passes with those that the denoiser takes."""
    passed = _passed(config)
    for name, (types, dims) in passed.items():
        if name not in taken:
            yield config.remark(
                f'{DENOISER}: received no input "{name}", expected one: a bls sampler passes it. '
                "Add it there, or remove it here."
            )
            continue
        received = _describe(taken[name])
        if received[0] not in types or (dims is not None and received[1] != dims):
            shape = "" if dims is None else f", dims {dims}"
            yield config.remark(
                f'{DENOISER}: received input "{name}" of {received[0]}, dims {received[1]}, '
                f"expected {' or '.join(types)}{shape}, as the sampler passes it. Make them equal."
            )
    required = {name for name, tensor in taken.items() if not tensor.optional}
    for name in sorted(required - passed.keys() - (_PASSED - {"class_labels"})):
        yield config.remark(
            f'{DENOISER}: received a required input "{name}", expected only what a bls sampler '
            f"passes: {', '.join(passed)}. Add it to the sampler's inputs."
        )


def _passed(config: Config) -> dict[str, tuple[tuple[str, ...], list[int] | None]]:
    """Return the inputs that a bls sampler passes: types, and dims where they are known."""
    inputs, latents = config.tensors("input"), config.tensors("output").get("latents")
    passed: dict[str, tuple[tuple[str, ...], list[int] | None]] = {
        "sample": (("TYPE_FP32",), None if latents is None else list(latents.dims)),
        "timestep": (("TYPE_FP32",), [1]),
    }
    if "label" in inputs:
        passed["class_labels"] = (_LABELS, [1])
    for name, tensor in inputs.items():
        if name not in _REQUEST_INPUTS:
            passed[name] = ((enum_name(tensor, "data_type"),), list(tensor.dims))
    return passed


def sampler_has_decoder(config: Config) -> Remarks:
    """A sampler that decodes latents has a decoder beside it."""
    folders = config.folder.repository.folders
    if config.parameter("treeq_vae") is not None and VAE_DECODER not in folders:
        yield config.remark(
            f"parameters: received treeq_vae without a model {VAE_DECODER} beside it, expected "
            "one. Add it with `treeq-export serve --vae`, or remove the parameter and the output "
            "image."
        )
