"""settings.json of a served model: written by `treeq-export serve`, read inside the server."""

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from treeq_served.check_manifest import AGAIN, read_object

Settings = TypeVar("Settings", "NetworkSettings", "SamplerSettings")

SETTINGS_FILE = "settings.json"
ONNXRUNTIME = "onnxruntime"
DENOISER, SAMPLER, VAE_DECODER = "denoiser", "sampler", "vae_decoder"  # the models


@dataclass(frozen=True)
class NetworkSettings:
    """The denoiser, and how a process opens it.

    Attributes:
        model: Name of the model's folder in the repository.
        runtime: "onnxruntime", "tensorrt" or "tensorrt-rtx".
        file: The graph or engine, relative to that folder.
        library: Library of custom ops, relative to that folder; None where none is needed.
        inputs: numpy's name of the type of every input, in order.
        output: Name of the output.
        max_batch: Most rows of a call.
        gpu: Architecture such as "sm_89"; None on the CPU.
        threads: Threads inside an operator; None lets the runtime choose.
        fold_constants: Whether ONNX Runtime computes constants at load.
    """

    model: str
    runtime: str
    file: str
    library: str | None
    inputs: dict[str, str]
    output: str
    max_batch: int
    gpu: str | None = None
    threads: int | None = None
    fold_constants: bool = True


@dataclass(frozen=True)
class SamplerSettings:
    """What the sampler does.

    Attributes:
        network: The denoiser.
        scheduler: The argument of `make_scheduler`.
        steps: Number of steps of a request that names none.
        guidance_scale: Guidance of a request that names none.
        sample_shape: Shape of one sample without the batch axis.
        prediction_channels: Channels of the output that are the prediction; None takes all.
        num_classes: Labels are 0..num_classes-1; None of text models.
        conditioning: Shape of one row of every text input.
        null: Value that fills each conditioning input in the unconditional half of guidance.
        embedded_guidance: Default of the guidance that the network itself takes (distilled Flux):
            then a request's guidance goes there; None of networks that take none.
        image: "pixels" (samples are images in [-1, 1]), "vae", or None: latents only.
        concurrency: Most requests that are sampled at a time in mode bls, or when streaming.
    """

    network: NetworkSettings
    scheduler: str | dict[str, Any]
    steps: int
    guidance_scale: float
    sample_shape: list[int]
    prediction_channels: int | None
    num_classes: int | None
    conditioning: dict[str, list[int]]
    null: dict[str, float]
    embedded_guidance: float | None
    image: str | None
    concurrency: int


def to_json(settings: NetworkSettings | SamplerSettings) -> str:
    """Return the content of settings.json."""
    return json.dumps(asdict(settings), indent=2) + "\n"


def _make(kind: type[Settings], content: Any, folder: Path) -> Settings:
    """Return settings from JSON's objects.

    Raises:
        ValueError: A field is missing, unknown or of another type.
    """
    path = folder / SETTINGS_FILE
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object. {AGAIN}.")  # noqa: TRY004
    hints = get_type_hints(kind)
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    if wrong := sorted((content.keys() - hints.keys()) | (needed - content.keys())):
        raise ValueError(f"{path}: {wrong[0]}: missing, or not known here. {AGAIN}.")
    for name in sorted(content):
        if not _fits(content[name], hints[name]):
            raise ValueError(f"{path}: {name}: of another type than {hints[name]}. {AGAIN}.")
    return kind(**content)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of a type as the settings have them."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is list:
        return isinstance(value, list) and all(_fits(each, arguments[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(each, arguments[1]) for each in value.values())
    if arguments:  # a union
        return any(_fits(value, each) for each in arguments)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def read_network(folder: Path) -> NetworkSettings:
    """Read the settings of a denoiser from its version's folder.

    Raises:
        ValueError: They cannot be read, or are of another form.
    """
    return _make(NetworkSettings, read_object(folder / SETTINGS_FILE), folder)


def read_sampler(folder: Path) -> SamplerSettings:
    """Read the settings of a sampler from its version's folder.

    Raises:
        ValueError: They cannot be read, or are of another form.
    """
    content = read_object(folder / SETTINGS_FILE)
    content["network"] = _make(NetworkSettings, content.get("network"), folder)
    return _make(SamplerSettings, content, folder)
