"""Rules about ONNX graphs: what ONNX Runtime's backend compares with the configuration.

The comparison is the backend's (onnxruntime_backend, `ValidateInputs` and `CompareDimsSupported`):
the first axis of every tensor has to be free; the others have to be what dims, after reshape, say.
Where the graph leaves an axis free, nothing is said about it.
"""

from pathlib import Path
from typing import Any

from treeq_export.errors import ServeError
from treeq_export.serve.lint.read import Config, Remark, Remarks, enum_name

# By ONNX's number of the type: FLOAT, INT32, INT64, FLOAT16.
_TYPES = {1: "TYPE_FP32", 6: "TYPE_INT32", 7: "TYPE_INT64", 10: "TYPE_FP16"}


def _graph(config: Config) -> tuple[Path, Any] | None:
    """Return the file and the graph that is served; None as a graph where it cannot be read."""
    path, graphs = config.model_file, config.folder.repository.graphs
    if config.backend != "onnxruntime" or path is None or not path.is_file():
        return None
    if path not in graphs:
        from treeq_export.runners.graph_file import read_proto  # heavy: onnx

        try:
            graph = read_proto(path, error=ServeError, remedy="").graph
            graphs[path] = graph if graph.output else None
        except ServeError:
            graphs[path] = None
    return path, graphs[path]


def graph_is_readable(config: Config) -> Remarks:
    """A file that is to be an ONNX graph is one."""
    found = _graph(config)
    if found is not None and found[1] is None and found[0].stat().st_size:
        path = found[0]
        yield Remark(
            path,
            f"received {path.stat().st_size} bytes that are no ONNX graph, expected one. Copy "
            "it again, or run `treeq-export serve` again.",
        )


def graph_tensors(config: Config) -> Remarks:
    """The configuration's inputs and outputs are the graph's: names, types and shapes."""
    found = _graph(config)
    if found is None or found[1] is None:
        return
    path, graph = found
    inputs = {value.name: value for value in graph.input}
    constants = {tensor.name for tensor in graph.initializer}
    for name in sorted(inputs.keys() - constants - config.tensors("input").keys()):
        yield config.remark(
            f'input "{name}": received none of this name, expected the input of {_at(path)}: '
            "the model would not load. Add it."
        )
    yield from _compare(config, path, "input", inputs)
    yield from _compare(config, path, "output", {value.name: value for value in graph.output})


def _compare(config: Config, path: Path, kind: str, values: dict[str, Any]) -> Remarks:
    for name, tensor in config.tensors(kind).items():
        if name not in values:
            yield config.remark(
                f'{kind} "{name}": received a name that {_at(path)} does not have, expected some '
                f"of {', '.join(sorted(values))}. Write the graph's name."
            )
            continue
        graph_type = values[name].type.tensor_type
        received = enum_name(tensor, "data_type")
        expected = _TYPES.get(graph_type.elem_type, "a type that Triton has")
        if received != expected:
            yield config.remark(
                f'{kind} "{name}": received {received}, expected {expected} as in {_at(path)}. '
                f"Write data_type: {expected}."
            )
        problem = _shape_problem(config, path, tensor, graph_type)
        if problem:
            yield config.remark(f'{kind} "{name}": {problem}')


def _shape_problem(config: Config, path: Path, tensor: Any, graph_type: Any) -> str:
    """Return the difference between a tensor's shape and the graph's; empty where they agree."""
    shape = graph_type.shape
    axes = [axis.dim_value if axis.HasField("dim_value") else -1 for axis in shape.dim]
    if not axes:
        return ""
    if axes[0] != -1:
        return (
            f"received max_batch_size {config.message.max_batch_size}, expected a free first axis, "
            f"but {_at(path)} has the fixed shape {axes}. Export it with a free batch."
        )
    rows = axes[1:]
    dims = list(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)
    if len(rows) == len(dims) and all(
        axis in (-1, dim) for axis, dim in zip(rows, dims, strict=True)
    ):
        return ""
    return (
        f"received {dims}, expected {rows}, the shape in {_at(path)} without the batch axis. "
        "Write dims, or a reshape, like that."
    )


def _at(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
