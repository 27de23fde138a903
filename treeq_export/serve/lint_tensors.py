"""Rules about the inputs and outputs that a configuration states."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from treeq_export.serve.lint_read import DENOISER, VAE_DECODER, Config, Remarks, enum_name

_ANY = -1  # a dimension that a request decides on


def stated_tensors(config: Config) -> Iterator[tuple[str, Any]]:
    """Yield every tensor with the words that name it in a message."""
    for kind in ("input", "output"):
        for index, tensor in enumerate(getattr(config.message, kind)):
            yield (f'{kind} "{tensor.name}"' if tensor.name else f"{kind} {index}"), tensor


def tensors_are_stated(config: Config) -> Remarks:
    """There are inputs and outputs; a model without them loads and cannot be asked for anything."""
    for kind in ("input", "output"):
        if not getattr(config.message, kind):
            yield config.remark(
                f"{kind}: received none, expected one or more: the server may load the model and "
                f"refuse every request. State each {kind}'s name, data_type and dims."
            )


def tensor_name(config: Config) -> Remarks:
    """Inputs have names of their own, and so have outputs; an input and an output may share one."""
    for kind in ("input", "output"):
        counts = Counter(tensor.name for tensor in getattr(config.message, kind))
        if counts.pop("", 0):
            yield config.remark(f"{kind}: received no name, expected one. Write name.")
        for name, count in counts.items():
            if count > 1:
                yield config.remark(
                    f'{kind} "{name}": received {count} of this name, expected one: no request '
                    "can satisfy both. Remove the others."
                )


def tensor_type(config: Config) -> Remarks:
    """Types are stated, and are ones that numpy and the model's host code have."""
    ours = config.is_sampler or config.folder.name in (DENOISER, VAE_DECODER)
    for where, tensor in stated_tensors(config):
        name = enum_name(tensor, "data_type")
        if name == "TYPE_INVALID" or not name.startswith("TYPE_"):
            yield config.remark(
                f"{where}: received data_type {name}, or none, expected a type. Write for "
                "instance data_type: TYPE_FP32."
            )
        elif name == "TYPE_BF16":
            yield config.remark(
                f"{where}: received TYPE_BF16, expected TYPE_FP32 or TYPE_FP16: numpy has no such "
                "type, so clients cannot read it. Cast at the model's border."
            )
        elif name == "TYPE_STRING" and (ours or config.backend == "tensorrt"):
            yield config.remark(
                f"{where}: received TYPE_STRING, expected a number: this model computes with it. "
                "Write the type of the graph's tensor."
            )


def tensor_dims(config: Config) -> Remarks:
    """Shapes are stated: every dimension is at least 1, or -1 for any."""
    for where, tensor in stated_tensors(config):
        dims = list(tensor.dims)
        if not dims or any(dim < 1 and dim != _ANY for dim in dims):
            yield config.remark(
                f"{where}: received dims {dims}, expected one or more dimensions, each at least 1 "
                "or -1 for any. Write dims without the batch axis; of a scalar, dims: [1] and "
                "reshape { shape: [] }."
            )


def tensor_reshape(config: Config) -> Remarks:
    """A reshape keeps the number of elements between any two dimensions of -1."""
    for where, tensor in stated_tensors(config):
        if not tensor.HasField("reshape"):
            continue
        dims, shape = list(tensor.dims), list(tensor.reshape.shape)
        if not shape and config.message.max_batch_size == 0:
            yield config.remark(
                f"{where}: received an empty reshape with max_batch_size 0, expected one or more "
                "dimensions: there would be no axis left. Write max_batch_size: 1 or more."
            )
        elif any(dim < 1 and dim != _ANY for dim in shape) or _counts(dims) != _counts(shape):
            yield config.remark(
                f"{where}: received reshape {shape} of dims {dims}, expected the same number of "
                "elements. Write a shape with as many."
            )


def _counts(dims: Sequence[int]) -> list[int]:
    """Return the numbers of elements before, between and after dimensions of -1."""
    counts, current = [], list[int]()
    for dim in dims:
        if dim == _ANY:
            counts.append(math.prod(current))
            current = []
        else:
            current.append(dim)
    return [*counts, math.prod(current)]


def tensor_format(config: Config) -> Remarks:
    """Formats of images have three dimensions, and TensorRT's formats are left to TensorRT."""
    for where, tensor in stated_tensors(config):
        formats = ["is_non_linear_format_io"] if tensor.is_non_linear_format_io else []
        if hasattr(tensor, "format") and enum_name(tensor, "format") != "FORMAT_NONE":
            formats.append(enum_name(tensor, "format"))
        if formats and len(tensor.dims) != 3:
            yield config.remark(
                f"{where}: received {' and '.join(formats)} for dims {list(tensor.dims)}, "
                "expected three dimensions. Remove it."
            )
        for name in ("is_shape_tensor", "is_non_linear_format_io"):
            if getattr(tensor, name) and config.backend != "tensorrt":
                yield config.remark(
                    f'{where}: received {name} for backend "{config.backend}", expected it for '
                    f"TensorRT alone. Remove {name}."
                )


def tensor_is_optional(config: Config) -> Remarks:
    """ONNX Runtime's backend has no optional inputs where it batches."""
    if config.backend != "onnxruntime" or config.message.max_batch_size < 1:
        return
    for tensor in config.message.input:
        if tensor.optional:
            yield config.remark(
                f'input "{tensor.name}": received optional: true, expected a required input: '
                "ONNX Runtime's backend refuses it where max_batch_size is 1 or more. "
                "Remove optional."
            )
