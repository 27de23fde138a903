"""Changing a graph: initializers, and nodes in the place of others.

What takes a value's place takes its name, type and shape, since layers are found by these names.
Nodes that nothing reads any more are removed at once, with those that only they have read: a later
match must not take them for readers.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray


def add_initializer(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """Return the initializer of that name, adding it where it is missing."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.register_initializer(ir.val(name, const_value=tensor))
    return graph.initializers[name]


def initializer_array(value: ir.Value | None) -> NDArray[Any]:
    """Return the array of an initializer."""
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def add_cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, suffix: str) -> ir.Value:
    """Return a value in another type; the Cast stands behind what computes the value."""
    name = f"{value.name}/{suffix}"
    cast = ir.node("Cast", [value], attributes={"to": dtype.value}, name=name)
    output, producer = cast.outputs[0], value.producer()
    output.name, output.shape, output.type = name, value.shape, ir.TensorType(dtype)
    if producer is None:
        graph.insert_before(graph[0], cast)
    else:
        graph.insert_after(producer, cast)
    return output


def replace_node(graph: ir.Graph, old: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Put nodes in the place of the one that computes a value; the last one computes it then."""
    place = old.producer()
    assert place is not None
    replace_values(graph, place, nodes, [old], nodes[-1].outputs)


def replace_values(
    graph: ir.Graph,
    place: ir.Node,
    nodes: Sequence[ir.Node],
    old_values: Sequence[ir.Value],
    values: Sequence[ir.Value],
) -> None:
    """Put nodes before another one, and the values that they compute in the place of others.

    Args:
        graph: Holds the node.
        place: The node to put them before.
        nodes: Nodes to put there.
        old_values: Values that nothing reads afterwards; what only they needed is removed.
        values: Values of the new nodes, as many; they take name, type and shape.
    """
    names = [value.name for value in old_values]
    producers = [value.producer() for value in old_values]
    for old, value in zip(old_values, values, strict=True):
        value.type, value.shape = old.type, old.shape
    graph.insert_before(place, nodes)
    ir.convenience.replace_all_uses_with(old_values, values, replace_graph_outputs=True)
    remove_unread(graph, producers)
    for value, name in zip(values, names, strict=True):
        value.name = name


def remove_unread(graph: ir.Graph, nodes: Iterable[ir.Node | None]) -> None:
    """Remove those of the nodes that nothing reads, and then what only they have read."""
    left = [node for node in nodes if node is not None]
    while left:
        node = left.pop()
        if node.graph is not graph or any(_is_read(value) for value in node.outputs):
            continue
        inputs = [value for value in node.inputs if value is not None]
        graph.remove(node, safe=True)
        left += [producer for value in inputs if (producer := value.producer())]
        for value in inputs:
            if value.is_initializer() and not _is_read(value):
                graph.initializers.pop(value.name or "", None)


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output() or value.is_graph_input()
