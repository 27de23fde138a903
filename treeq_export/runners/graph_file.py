"""Reading ONNX graphs that somebody else may have written, damaged or cut short.

A graph is opened by its absolute path, because onnx_ir checks where external data lie only for
graphs whose folder it knows. Every fault is one line, found before a tensor is used:

    protobuf        not a model, or one that onnx_ir cannot represent
    values          no input, no output, one of them without a name
    tensors         another number of bytes than type and shape need
    external data   not a regular file inside the folder, or too short

A data file may be a hard link, as `cp -al` makes them, or a symbolic link to a file in the folder
of the graph or in the folder that the graph is itself a link to, as download caches have them.
Another symbolic link is refused, as ONNX Runtime does.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from treeq_export.errors import OutputError, TreeqError
from treeq_export.reading import read_bytes

MAX_GRAPH_BYTES = 1 << 31  # of protobuf
IN_MEMORY_BYTES = 1_000_000_000
_PATH = "treeq.path"
_DATA_FIELDS = (
    "float_data",
    "int32_data",
    "string_data",
    "int64_data",
    "double_data",
    "uint64_data",
)  # of a tensor whose bytes are not in raw_data


class _DamagedError(ValueError):
    """What is wrong with a graph, without file and remedy."""


def read_graph(path: Path, *, error: type[TreeqError], remedy: str) -> ir.Model:
    """Read a graph; the weights in its external data are mapped, not copied.

    Args:
        path: The model file.
        error: Class of the errors.
        remedy: A sentence that ends every error.

    Raises:
        TreeqError: It cannot be read, is damaged, or its external data are; of the class `error`.
    """
    path = path.absolute()
    proto = read_proto(path, error=error, remedy=remedy)
    try:
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, path.parent)
        _check_values(model)
        for value in _initializers(model):
            value.const_value = _checked(path, value.const_value)
        for attribute in _tensor_attributes(model):
            _checked(path, attribute.value)
    except _DamagedError as fault:
        raise error(f"{path}: damaged: {fault}. {remedy}") from fault
    except MemoryError:
        raise
    except Exception as fault:  # onnx_ir raises whatever it met
        first = fault
        while first.__cause__ is not None:  # onnx_ir wraps one in another
            first = first.__cause__
        reason = " ".join(f"{type(first).__name__}: {first}".split())
        raise error(f"{path}: not an ONNX graph ({reason:.200}). {remedy}") from fault
    model.meta[_PATH] = str(path)
    return model


def read_proto(path: Path, *, error: type[TreeqError], remedy: str) -> onnx.ModelProto:
    """Read the protobuf of a graph and nothing else.

    Raises:
        TreeqError: It cannot be read, or is no protobuf of a model; of the class `error`.
    """
    data = read_bytes(path, error=error, remedy=remedy, max_bytes=MAX_GRAPH_BYTES)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as fault:
        raise error(f"{path}: not an ONNX graph ({fault}). {remedy}") from fault
    if not all(isinstance(text, str) for text in _texts(proto)):  # bytes where they are not UTF-8
        raise error(f"{path}: damaged: a name is not UTF-8. {remedy}")
    return proto


def _texts(proto: onnx.ModelProto) -> Iterator[object]:
    """Yield the names of the graph and of its functions, and where external data lie."""
    graph = proto.graph
    for named in (*graph.input, *graph.output, *graph.node, *graph.initializer):
        yield named.name
    for node in (*graph.node, *(node for function in proto.functions for node in function.node)):
        yield from (node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
    for function in proto.functions:
        yield from (function.name, function.domain)
    for tensor in graph.initializer:
        for entry in tensor.external_data:
            yield from (entry.key, entry.value)
    for imported in proto.opset_import:
        yield imported.domain


def initializer_bytes(model: ir.Model) -> int:
    """Return the bytes of all initializers."""
    values = model.graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)


@contextmanager
def runnable(model: ir.Model, folder: Path) -> Iterator[Path | bytes]:
    """Yield a changed graph as ONNX Runtime takes it.

    A small one stays in memory. Of a large one, which protobuf could not hold, graph and weights
    are written to a folder that is removed afterwards.

    Args:
        model: The graph; small external weights are loaded into it.
        folder: Takes a large graph, and needs as much space as the weights take.

    Raises:
        OutputError: There is no space for it, or the folder cannot be written to.
    """
    if initializer_bytes(model) <= IN_MEMORY_BYTES:
        ir.external_data.load_to_model(model)
        yield ir.to_proto(model).SerializeToString()
        return
    with TemporaryDirectory(
        prefix=f".treeq-{os.getpid()}-", suffix=".partial", dir=folder, ignore_cleanup_errors=True
    ) as written:
        path = Path(written) / "model.onnx"
        try:
            ir.save(model, path, external_data=f"{path.name}.data")
        except OSError as fault:
            raise OutputError(
                f"{folder}: no copy of {initializer_bytes(model) / 1e9:.1f} GB of weights can be "
                f"written ({fault.strerror or fault}). Free as much space, and run it again."
            ) from fault
        yield path


def path_of(model: ir.Model) -> str:
    """Return the file that a graph was read from, for messages."""
    return model.meta.get(_PATH, "the graph")


def _check_values(model: ir.Model) -> None:
    for kind, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        if not values:
            raise _DamagedError(f"it has no {kind}")
        if not all(value.name for value in values):
            raise _DamagedError(f"an {kind} has no name")
    if not model.opset_imports:
        raise _DamagedError("it imports no operators")
    for graph in model.graphs():
        for node in graph:
            for value in node.inputs:
                if value is not None and not _is_written(value):
                    raise _DamagedError(
                        f"node {node.name!r} reads {value.name!r}, which is nowhere"
                    )


def _is_written(value: ir.Value) -> bool:
    return value.producer() is not None or value.is_graph_input() or value.is_initializer()


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()


def _tensor_attributes(model: ir.Model) -> Iterator[Any]:
    for graph in (*model.graphs(), *(function.graph for function in model.functions.values())):
        for node in graph.all_nodes():
            for attribute in node.attributes.values():
                if not attribute.is_ref() and attribute.type == ir.AttributeType.TENSOR:
                    yield attribute


def _checked(path: Path, tensor: Any) -> Any:
    """Return a tensor whose data are there, mapped where onnx_ir would refuse to map them."""
    if tensor is None:
        raise _DamagedError("an initializer has no value")
    if isinstance(tensor, ir.ExternalTensor):
        return _map_external(path, tensor)
    proto: Any = getattr(tensor, "raw", None)
    if isinstance(proto, onnx.TensorProto):
        size = len(proto.raw_data)
        if proto.HasField("raw_data") and size != tensor.nbytes:
            raise _DamagedError(
                f"tensor {tensor.name!r} has {size} bytes, expected {tensor.nbytes}"
            )
        if not size:
            if tensor.nbytes and not any(len(getattr(proto, field)) for field in _DATA_FIELDS):
                raise _DamagedError(f"tensor {tensor.name!r} has no data")
            tensor.numpy()  # fails where the shape does not fit
    return tensor


def _map_external(path: Path, tensor: ir.ExternalTensor) -> Any:
    """Check where external data lie; map those of a file with several names."""
    name, location = f"tensor {tensor.name!r}", str(tensor.location)
    if Path(location).is_absolute() or ".." in Path(location).parts or "\0" in location:
        raise _DamagedError(f"{name} lies in {location!r}, expected a file of its own folder")
    file = path.parent / location
    try:
        status, resolved = file.stat(), file.resolve(strict=True)
    except OSError as fault:
        raise _DamagedError(f"{name} lies in {location!r}: {fault.strerror}") from fault
    if not stat.S_ISREG(status.st_mode):
        raise _DamagedError(f"{name} lies in {location!r}, which is not a regular file")
    folders = path.parent.resolve(), path.resolve().parent
    if not any(resolved.is_relative_to(folder) for folder in folders):
        raise _DamagedError(
            f"{name} lies in {location!r}, a link to {resolved} outside of the graph's folder; "
            "put a copy of the file there"
        )
    offset, num_bytes = tensor.offset or 0, tensor.nbytes
    if tensor.length not in (None, num_bytes):
        raise _DamagedError(f"{name} has {tensor.length} bytes, expected {num_bytes}")
    if offset < 0 or offset + num_bytes > status.st_size:
        raise _DamagedError(
            f"{name} ends at byte {offset + num_bytes} of {location!r}, which has {status.st_size}"
        )
    if status.st_nlink == 1 and resolved.is_relative_to(folders[0]):
        return tensor
    return _mapped(tensor, resolved, offset)


def _mapped(tensor: ir.ExternalTensor, file: Path, offset: int) -> Any:
    data = np.empty(0, np.uint8)
    if tensor.nbytes:  # nothing cannot be mapped
        data = np.memmap(file, np.uint8, "r", offset, (tensor.nbytes,))
    if tensor.dtype.bitwidth < 8:
        return ir.PackedTensor(data, tensor.dtype, shape=tensor.shape, name=tensor.name)
    values = np.frombuffer(data, tensor.dtype.numpy()).reshape(tensor.shape.numpy())
    return ir.Tensor(values, dtype=tensor.dtype, name=tensor.name)
