"""Rules about ONNX graphs: what ONNX Runtime's backend compares with the configuration, and files.

The comparison is the backend's (onnxruntime_backend, `ValidateInputs` and `CompareDimsSupported`):
the first axis of every tensor has to be free where max_batch_size is 1 or more; the others have to
be what dims, after reshape, say. Where the graph leaves an axis free, nothing is said about it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treeq_export.errors import ServeError
from treeq_export.serve.lint_files import model_files
from treeq_export.serve.lint_read import Config, Remark, Remarks, enum_name, shape_of
from treeq_export.serve.lint_warmup import scheduler_inputs

_OUR_DOMAIN = "treeq"
_TYPES = {
    "FLOAT": "TYPE_FP32",
    "FLOAT16": "TYPE_FP16",
    "DOUBLE": "TYPE_FP64",
    "BFLOAT16": "TYPE_BF16",
    "STRING": "TYPE_STRING",
    "BOOL": "TYPE_BOOL",
    **{
        f"{sign}INT{bits}": f"TYPE_{sign}INT{bits}"
        for sign in ("", "U")
        for bits in (8, 16, 32, 64)
    },
}


def _graph_files(config: Config) -> Iterator[Path]:
    """Yield the graphs that are served and there, of at least one byte."""
    if config.backend != "onnxruntime":
        return
    for file in model_files(config):
        path = file / file.name if file.is_dir() else file  # the backend takes either
        if path.is_file() and path.stat().st_size:
            yield path


def _read(config: Config, path: Path) -> Any:
    """Return a graph without its external data; None where it cannot be read."""
    graphs = config.folder.repository.graphs
    if path not in graphs:
        from treeq_export.runners.graph_file import read_proto  # heavy: onnx

        try:
            model = read_proto(path, error=ServeError, remedy="")
            graphs[path] = model if model.graph.output else None
        except ServeError:
            graphs[path] = None
    return graphs[path]


def _graphs(config: Config) -> Iterator[tuple[Path, Any]]:
    for path in _graph_files(config):
        model = _read(config, path)
        if model is not None:
            yield path, model


def graph_is_readable(config: Config) -> Remarks:
    """A file that is to be an ONNX graph is one."""
    for path in _graph_files(config):
        if _read(config, path) is None:
            yield Remark(
                path,
                f"received {path.stat().st_size} bytes that are no ONNX graph, expected one. Copy "
                "it again, or run `treeq-export serve` again.",
            )


def graph_inputs(config: Config) -> Remarks:
    """The configuration's inputs are the graph's: names, types and shapes."""
    for path, model in _graphs(config):
        values = {value.name: value for value in model.graph.input}
        constants = {tensor.name for tensor in model.graph.initializer}
        stated = {tensor.name: tensor for tensor in config.message.input}
        made = scheduler_inputs(config)
        for name in sorted(values.keys() - constants - made - stated.keys()):
            yield config.remark(
                f'input "{name}": received none of this name, expected the input of {_at(path)}: '
                "the model would not load. Add it."
            )
        yield from _compare(config, path, "input", stated, values)


def graph_outputs(config: Config) -> Remarks:
    """The configuration's outputs are outputs of the graph, of the same types and shapes."""
    for path, model in _graphs(config):
        values = {value.name: value for value in model.graph.output}
        stated = {tensor.name: tensor for tensor in config.message.output}
        yield from _compare(config, path, "output", stated, values)


def _compare(
    config: Config, path: Path, kind: str, stated: dict[str, Any], values: dict[str, Any]
) -> Remarks:
    for name, tensor in stated.items():
        if name not in values:
            yield config.remark(
                f'{kind} "{name}": received a name that {_at(path)} does not have, expected some '
                f"of {', '.join(sorted(values))}. Write the graph's name."
            )
            continue
        graph_type = values[name].type.tensor_type
        received, expected = enum_name(tensor, "data_type"), _type_name(graph_type)
        if received != expected:
            yield config.remark(
                f'{kind} "{name}": received {received}, expected {expected} as in {_at(path)}. '
                f"Write data_type: {expected}."
            )
        if graph_type.HasField("shape"):
            yield from _compare_shape(config, path, f'{kind} "{name}"', tensor, graph_type.shape)


def _compare_shape(config: Config, path: Path, where: str, tensor: Any, shape: Any) -> Remarks:
    axes = [axis.dim_value if axis.HasField("dim_value") else -1 for axis in shape.dim]
    dims = shape_of(tensor)
    if not axes:
        if any(dim != 1 for dim in dims):
            yield config.remark(
                f"{where}: received dims {dims}, expected [1]: in {_at(path)} it is one number. "
                "Write dims: [1]."
            )
        return
    batches = config.message.max_batch_size > 0
    if batches and axes[0] != -1:
        yield config.remark(
            f"{where}: received max_batch_size {config.message.max_batch_size}, expected a free "
            f"first axis, but {_at(path)} has the fixed shape {axes}. Export it with a free batch."
        )
        return
    rows = axes[1:] if batches else axes
    fits = len(rows) == len(dims) and all(
        axis in (-1, dim) for axis, dim in zip(rows, dims, strict=True)
    )
    if not fits:
        yield config.remark(
            f"{where}: received {dims}, expected {rows}, the shape in {_at(path)}"
            f"{' without the batch axis' if batches else ''}. Write dims, or a reshape, like that."
        )


def _type_name(graph_type: Any) -> str:
    import onnx

    names = {number: name for name, number in onnx.TensorProto.DataType.items()}
    name = names.get(graph_type.elem_type, f"type {graph_type.elem_type}")
    return _TYPES.get(name, f"{name}, which Triton does not have,")


def _at(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def external_data(config: Config) -> Remarks:
    """Files of external data are beside the graph, and as long as the graph says."""
    for path, model in _graphs(config):
        sizes: dict[str, int] = {}
        for tensor in _tensors(model):
            entries = {entry.key: entry.value for entry in tensor.external_data}
            location = entries.get("location", "")
            end = _size(entries.get("offset")) + _size(entries.get("length"))
            if location:
                sizes[location] = max(sizes.get(location, 0), end)
        for location, size in sorted(sizes.items()):
            yield from _check_data(path, location, size)


def _size(text: str | None) -> int:
    """Return a number of bytes; 0 for none, and for what is no number."""
    return int(text) if text and len(text) < 20 and text.isdecimal() else 0


def _check_data(path: Path, location: str, size: int) -> Remarks:
    file = path.parent / location
    if Path(location).is_absolute() or ".." in Path(location).parts:
        yield Remark(
            path,
            f'received external data in "{location}", expected a file beside the graph: ONNX '
            "Runtime opens no other. Save the graph again.",
        )
    elif not file.is_file():
        yield Remark(
            file,
            f"received no such file, expected the external data of {_at(path)}. Copy it beside "
            "the graph.",
        )
    elif file.stat().st_size < size:
        yield Remark(
            file,
            f"received {file.stat().st_size} bytes, expected at least {size}, the external data "
            f"of {_at(path)}. Copy it again.",
        )


def _tensors(model: Any) -> Iterator[Any]:
    """Yield every tensor that is stored in the graph, its subgraphs and its functions."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        if attribute.HasField("g"):
            yield from _graph_tensors(attribute.g)


def operator_is_known(config: Config) -> Remarks:
    """Operators of our own domain have a body in the graph, or a library that defines them."""
    if config.message.model_operations.op_library_filename:
        return
    for path, model in _graphs(config):
        bodies = {(body.domain, body.name, body.overload) for body in model.functions}
        nodes = [*model.graph.node, *(node for body in model.functions for node in body.node)]
        unknown = {
            node.op_type
            for node in nodes
            if node.domain == _OUR_DOMAIN
            and (node.domain, node.op_type, node.overload) not in bodies
        }
        if unknown:
            yield config.remark(
                f"op_library_filename: received none, expected the library of "
                f"{', '.join(sorted(unknown))}: {_at(path)} has no bodies for them. Name "
                "libtreeq_ort.so, or serve the target portable."
            )
