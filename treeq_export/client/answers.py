"""What a Triton server may say: the forms of its answers, and their limits.

An answer comes from another program, which may be a gateway, another server, or a broken one. So
nothing of it is used before it has been checked here; what has more fields than these keeps them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import (
    Annotated,
    Any,
    Required,  # pydantic reads Python's own from 3.12 on only
    TypeVar,
)

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

Form = TypeVar("Form")

MAX_JSON_BYTES = 4 << 20  # a model's configuration has some kB
MAX_TENSOR_BYTES = 256 << 20  # of all outputs of one request: 80 images of 1024 x 1024
_MAX_TENSORS = 1024
_MAX_DIMS = 16
_MAX_SIZE = 2**31 - 1
_SHOWN = 40

Text = Annotated[str, StringConstraints(max_length=65536)]
Count = Annotated[int, Field(ge=0, lt=2**64)]
Size = Annotated[int, Field(ge=0, le=_MAX_SIZE)]
Dims = Annotated[list[Annotated[int, Field(ge=-1, le=_MAX_SIZE)]], Field(max_length=_MAX_DIMS)]
Shape = Annotated[list[Size], Field(max_length=_MAX_DIMS)]
_MORE = ConfigDict(extra="allow")


@with_config(_MORE)
class TensorConfig(TypedDict, total=False):
    """An input or output of a model; its dims are without the batch, -1 is any size."""

    name: Required[Text]
    data_type: Text
    dims: Required[Dims]
    optional: bool


@with_config(_MORE)
class Parameter(TypedDict, total=False):
    """A parameter of a model."""

    string_value: Text


@with_config(_MORE)
class TransactionPolicy(TypedDict, total=False):
    """How a model answers."""

    decoupled: bool


@with_config(_MORE)
class DynamicBatching(TypedDict, total=False):
    """How the server merges requests."""

    max_queue_delay_microseconds: Count


@with_config(_MORE)
class InstanceGroup(TypedDict, total=False):
    """Instances of a model."""

    count: Size


Tensors = Annotated[list[TensorConfig], Field(max_length=_MAX_TENSORS)]


@with_config(ConfigDict(extra="allow", protected_namespaces=()))
class ModelConfig(TypedDict, total=False):
    """A model's configuration, in the JSON form of model_config.proto."""

    name: Text
    platform: Text
    backend: Text
    max_batch_size: Size
    input: Tensors
    output: Tensors
    parameters: dict[Text, Parameter]
    model_transaction_policy: TransactionPolicy
    dynamic_batching: DynamicBatching
    instance_group: list[InstanceGroup]


@with_config(_MORE)
class Duration(TypedDict, total=False):
    """How often something was done, and the sum of its nanoseconds."""

    count: Count
    ns: Count


@with_config(_MORE)
class VersionStatistics(TypedDict, total=False):
    """Counters of one version of a model."""

    version: Text
    inference_count: Count
    execution_count: Count
    inference_stats: dict[Text, Duration]


@with_config(ConfigDict(extra="allow", protected_namespaces=()))
class Statistics(TypedDict, total=False):
    """Counters of a model."""

    model_stats: list[VersionStatistics]


@with_config(_MORE)
class IndexEntry(TypedDict, total=False):
    """A model of the server's repository."""

    name: Required[Text]
    version: Text
    state: Text
    reason: Text


@with_config(_MORE)
class ServerMetadata(TypedDict, total=False):
    """The server itself."""

    name: Text
    version: Text


class ErrorAnswer(TypedDict):
    """Why there is no other answer."""

    error: str


class TensorParameters(TypedDict, total=False):
    """Where an output's values are: so many bytes after the JSON, in the order of the outputs."""

    binary_data_size: Count


class OutputTensor(TypedDict, total=False):
    """An output of a request; its values are in `data` where no bytes follow."""

    name: Required[Text]
    datatype: Required[Text]
    shape: Required[Shape]
    parameters: TensorParameters
    data: list[Any]


class InferAnswer(TypedDict):
    """The JSON part of the answer to a request."""

    outputs: Annotated[list[OutputTensor], Field(max_length=_MAX_TENSORS)]


CONFIG = TypeAdapter(ModelConfig)
STATISTICS = TypeAdapter(Statistics)
INDEX = TypeAdapter(list[IndexEntry])
METADATA = TypeAdapter(ServerMetadata)
ERROR = TypeAdapter(ErrorAnswer)
INFER = TypeAdapter(InferAnswer)


def read_json(form: TypeAdapter[Form], data: bytes) -> Form:
    """Read the JSON of an answer.

    Args:
        form: Form that the answer has to have.
        data: UTF-8.

    Raises:
        ValueError: It is something else; says where.

    Example:
        >>> read_json(METADATA, b'{"version": "2.51.0"}')
        {'version': '2.51.0'}
    """
    try:
        return form.validate_json(data)
    except ValidationError as error:
        start = data[:_SHOWN].decode(errors="replace")
        raise ValueError(f"received {start!r}{_describe(error)}, expected Triton's JSON") from error


def read_form(form: TypeAdapter[Form], value: Any) -> Form:
    """Check an answer that is JSON's objects already; see `read_json`.

    Raises:
        ValueError: It is something else; says where.
    """
    try:
        return form.validate_python(value)
    except ValidationError as error:
        raise ValueError(f"received another form{_describe(error)}") from error


def _describe(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part)[:_SHOWN] for part in first["loc"])
    return f" ({where}: {first['msg']})" if where else ""


def read_tensor(
    where: str, datatype: str, shape: Sequence[int], data: bytes | memoryview
) -> NDArray[Any]:
    """Return an output as an array of its own.

    Args:
        where: Model and output, for the message.
        datatype: Triton's name of its type, such as "FP32".
        shape: With the batch axis.
        data: Values, little-endian, row after row.

    Raises:
        ValueError: No such type of numbers, or another number of bytes than its shape says.

    Example:
        >>> read_tensor("sampler: image", "UINT8", [1, 2], b"ab")
        array([[97, 98]], dtype=uint8)
    """
    dtype = number_type(where, datatype)
    size = dtype.itemsize * math.prod(shape)
    if len(data) != size or any(axis < 0 for axis in shape):
        raise ValueError(
            f"{where}: received {len(data)} bytes, expected {size} of shape "
            f"{list(shape[:_MAX_DIMS])}"
        )
    return np.frombuffer(data, dtype).reshape(shape).copy()


def pick_outputs(
    model: str, found: Mapping[str, NDArray[Any]], names: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """Return the wanted outputs in order.

    Raises:
        ValueError: One is missing.
    """
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{model}: {missing[0]}: missing in the response")
    return {name: found[name] for name in names}


def number_type(where: str, datatype: str) -> np.dtype[Any]:
    """Return numpy's type of numbers by Triton's name.

    Raises:
        ValueError: There is none.
    """
    from tritonclient.utils import triton_to_np_dtype

    kind = triton_to_np_dtype(datatype)
    if kind is None or kind is np.object_:
        raise ValueError(f"{where}: received data type {datatype[:_SHOWN]!r}, expected numbers")
    return np.dtype(kind)


def clean(text: str, length: int = 1000) -> str:
    r"""Return what a server says as one line of printable characters.

    Args:
        text: Text of any length and content.
        length: Most characters of it.

    Example:
        >>> clean("a\n  b\x1b[31m")
        'a b[31m'
    """
    line = " ".join(text[: 8 * length].split())
    line = "".join(character for character in line if character.isprintable())
    return line if len(line) <= length else f"{line[:length]} (and more)"
