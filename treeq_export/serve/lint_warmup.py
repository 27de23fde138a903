"""Rules about warmup.

What Triton does with a sample was tried with the server and read in core: batch_size n is n
requests of one row each, run together; 0, or none, is skipped without a word; an input that the
model does not have is passed on to the backend without a word; dims are those of the configuration,
without the batch axis and before reshape; a file may be longer than the data.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

from treeq_export.serve.lint_read import DENOISER, Config, Remarks, enum_name

_ANY_VALUE_IS_RIGHT = ("seed",)  # input of a sampler


def _samples(config: Config) -> Iterator[tuple[str, Any]]:
    for index, sample in enumerate(config.message.model_warmup):
        yield (f'model_warmup "{sample.name}"' if sample.name else f"model_warmup {index}"), sample


def _sample_inputs(config: Config) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield place, name, sample's input and the model's input (None if unknown)."""
    inputs = {tensor.name: tensor for tensor in config.message.input}
    for where, sample in _samples(config):
        for name in sorted(sample.inputs):
            yield f'{where}: input "{name}"', name, sample.inputs[name], inputs.get(name)


def scheduler_inputs(config: Config) -> set[str]:
    """Return names of inputs that the server itself makes: control, state and batch inputs."""
    sequence = config.message.sequence_batching
    return {
        *(control.name for control in sequence.control_input),
        *(state.input_name for state in sequence.state),
        *(name for batch in config.message.batch_input for name in batch.target_name),
    }


def warmup_runs(config: Config) -> Remarks:
    """Every sample has a batch size of 1 to max_batch_size, and so is run."""
    limit = max(config.message.max_batch_size, 1)
    for where, sample in _samples(config):
        if sample.batch_size < 1:
            yield config.remark(
                f"{where}: received batch_size 0, or none, expected 1 to {limit}: the server "
                "skips the sample without a word. Write batch_size: 1."
            )
        elif sample.batch_size > limit:
            yield config.remark(
                f"{where}: received batch_size {sample.batch_size}, expected at most {limit}, "
                "which is max_batch_size: the model would not load. Write a smaller one."
            )


def warmup_inputs(config: Config) -> Remarks:
    """Every sample has all required inputs and no other."""
    required = {tensor.name for tensor in config.message.input if not tensor.optional}
    known = {tensor.name for tensor in config.message.input} | scheduler_inputs(config)
    for where, sample in _samples(config):
        missing, unknown = sorted(required - set(sample.inputs)), sorted(set(sample.inputs) - known)
        if missing:
            yield config.remark(
                f"{where}: received no {', '.join(missing)}, expected all of "
                f"{', '.join(sorted(required))}: the model would not load. Add it."
            )
        if unknown:
            yield config.remark(
                f"{where}: received {', '.join(unknown)}, expected inputs of the model only: the "
                "server passes others on without a word. Remove it."
            )


def warmup_types(config: Config) -> Remarks:
    """A sample's types are the inputs'."""
    for where, _, sample, tensor in _sample_inputs(config):
        if tensor is not None and sample.data_type != tensor.data_type:
            received, expected = enum_name(sample, "data_type"), enum_name(tensor, "data_type")
            yield config.remark(
                f"{where}: received {received}, expected {expected}: the model would not load. "
                f"Write data_type: {expected}."
            )


def warmup_dims(config: Config) -> Remarks:
    """A sample's dims are the inputs' own, all stated."""
    for where, _, sample, tensor in _sample_inputs(config):
        if tensor is None:
            continue
        dims, wanted = list(sample.dims), list(tensor.dims)
        fits = len(dims) == len(wanted) and all(
            dim >= 1 and want in (-1, dim) for dim, want in zip(dims, wanted, strict=True)
        )
        if not fits:
            yield config.remark(
                f"{where}: received dims {dims}, expected {wanted} with a number for each -1, "
                "without the batch axis and before reshape. Write these."
            )


def warmup_data(config: Config) -> Remarks:
    """A sample says what its data are, and random bytes are data for models that take any value."""
    for where, name, sample, _ in _sample_inputs(config):
        kind = sample.WhichOneof("input_data_type")
        if kind is None:
            yield config.remark(
                f"{where}: received no data, expected zero_data, random_data or input_data_file: "
                "the model would not load. Write zero_data: true."
            )
        elif kind == "random_data" and not _takes_any_value(config, name):
            yield config.remark(
                f"{where}: received random_data, which is random bytes, expected values in range: "
                "no class has such a label, and such floats include NaN. Write zero_data: true."
            )


def warmup_files(config: Config) -> Remarks:
    """Files of a sample's data are in the model's folder warmup/, and long enough."""
    for where, _, sample, _ in _sample_inputs(config):
        if sample.WhichOneof("input_data_type") != "input_data_file":
            continue
        path = config.folder.path / "warmup" / sample.input_data_file
        bits = re.sub(r"\D", "", enum_name(sample, "data_type"))
        num_bytes = math.prod(sample.dims) * int(bits or 0) // 8
        if not path.is_file():
            yield config.remark(
                f'{where}: received input_data_file "{sample.input_data_file}", which is not in '
                "the model's folder warmup/, expected a file there. Put it there."
            )
        elif path.stat().st_size < num_bytes:
            yield config.remark(
                f"{where}: received warmup/{sample.input_data_file} of {path.stat().st_size} "
                f"bytes, expected {num_bytes} or more: the model would not load. Write it again."
            )


def _takes_any_value(config: Config, name: str) -> bool:
    if config.is_sampler:
        return name in _ANY_VALUE_IS_RIGHT
    return config.folder.name != DENOISER or name != "class_labels"


def warmup_covers_profile(config: Config) -> Remarks:
    """The denoiser is warmed up for each batch size of its profile that it may get."""
    profile = config.folder.repository.profile
    if config.folder.name != DENOISER or profile is None:
        return
    limit = config.message.max_batch_size
    wanted = {size for size in (profile.min, profile.opt, profile.max) if size <= limit}
    missing = sorted(wanted - {sample.batch_size for sample in config.message.model_warmup})
    if missing:
        yield config.remark(
            f"model_warmup: received no sample of batch_size {', '.join(map(str, missing))}, "
            f"expected one of each of {sorted(wanted)} (manifest.json): the first request of that "
            "size would be slow. Add it."
        )
