"""Rules about the inputs and outputs that a configuration states, and its warmup.

What Triton does with a warmup sample was tried with the server and read in core: batch_size n is n
requests of one row each, run together; 0, or none, is skipped without a word; an input that the
model does not have is passed on to the backend without a word; dims are those of the configuration,
without the batch axis and before reshape; a file may be longer than the data.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

from treeq_export.serve.lint.read import Config, Remarks, enum_name, is_file
from treeq_served.settings import DENOISER

_ANY = -1  # a dimension that a request decides on


def tensors_are_stated(config: Config) -> Remarks:
    """There are inputs and outputs, each with a type and a shape."""
    for kind in ("input", "output"):
        tensors = getattr(config.message, kind)
        if not tensors:
            yield config.remark(
                f"{kind}: received none, expected one or more: the server may load the model and "
                f"refuse every request. State each {kind}'s name, data_type and dims."
            )
        for tensor in tensors:
            dims, data_type = list(tensor.dims), enum_name(tensor, "data_type")
            if not dims or any(dim < 1 and dim != _ANY for dim in dims):
                yield config.remark(
                    f'{kind} "{tensor.name}": received dims {dims}, expected one or more '
                    "dimensions, each at least 1 or -1 for any. Write dims without the batch axis; "
                    "of a scalar, dims: [1] and reshape { shape: [] }."
                )
            if data_type == "TYPE_INVALID" or not data_type.startswith("TYPE_"):
                yield config.remark(
                    f'{kind} "{tensor.name}": received data_type {data_type}, or none, expected a '
                    "type. Write for instance data_type: TYPE_FP32."
                )


def _samples(config: Config) -> Iterator[tuple[str, Any]]:
    for index, sample in enumerate(config.message.model_warmup):
        yield (f'model_warmup "{sample.name}"' if sample.name else f"model_warmup {index}"), sample


def warmup_inputs(config: Config) -> Remarks:
    """Every sample has all required inputs and no other."""
    inputs = config.tensors("input")
    required = {name for name, tensor in inputs.items() if not tensor.optional}
    for where, sample in _samples(config):
        missing = sorted(required - set(sample.inputs))
        unknown = sorted(set(sample.inputs) - inputs.keys())
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


def warmup_values(config: Config) -> Remarks:
    """A sample's inputs have the model's types and dims, and data."""
    inputs = config.tensors("input")
    for where, sample in _samples(config):
        for name in sorted(set(sample.inputs) & inputs.keys()):
            for problem in _problems(config, sample.inputs[name], inputs[name]):
                yield config.remark(f'{where}: input "{name}": {problem}')


def _problems(config: Config, sample: Any, tensor: Any) -> Iterator[str]:
    """Yield what is wrong with one input of a sample."""
    received, expected = enum_name(sample, "data_type"), enum_name(tensor, "data_type")
    if received != expected:
        yield (
            f"received {received}, expected {expected}: the model would not load. "
            f"Write data_type: {expected}."
        )
    dims, wanted = list(sample.dims), list(tensor.dims)
    if len(dims) != len(wanted) or any(
        dim < 1 or want not in (_ANY, dim) for dim, want in zip(dims, wanted, strict=True)
    ):
        yield (
            f"received dims {dims}, expected {wanted} with a number for each -1, without the "
            "batch axis and before reshape. Write these."
        )
    kind = sample.WhichOneof("input_data_type")
    if kind is None:
        yield (
            "received no data, expected zero_data, random_data or input_data_file: the model "
            "would not load. Write zero_data: true."
        )
    if kind == "input_data_file":
        path = config.folder.path / "warmup" / sample.input_data_file
        num_bytes = math.prod(dims) * int(re.sub(r"\D", "", received) or 0) // 8
        if not is_file(path):
            yield (
                f'received input_data_file "{sample.input_data_file}", which is not in the '
                "model's folder warmup/, expected a file there. Put it there."
            )
        elif path.stat().st_size < num_bytes:
            yield (
                f"received warmup/{sample.input_data_file} of {path.stat().st_size} bytes, "
                f"expected {num_bytes} or more: the model would not load. Write it again."
            )


def warmup_covers_profile(config: Config) -> Remarks:
    """The denoiser is warmed up for each batch size of its profile that it may get."""
    if config.folder.name != DENOISER:
        return
    limit, profile = config.message.max_batch_size, config.folder.repository.profile
    wanted = {size for size in profile.values() if size <= limit}
    missing = sorted(wanted - {sample.batch_size for sample in config.message.model_warmup})
    if missing:
        yield config.remark(
            f"model_warmup: received no sample of batch_size {', '.join(map(str, missing))}, "
            f"expected one of each of {sorted(wanted)} (manifest.json): the first request of that "
            "size would be slow. Add it."
        )
