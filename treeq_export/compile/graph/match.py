"""Finding: who computes a value, who reads it, and the small forms that several passes look for."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import onnx_ir as ir

from treeq_export.compile.graph.signature import DOMAIN, MONARCH, QLINEAR, nodes_of

RANK = 3  # of activations: (batch, tokens, channels)
SWAP = [0, 1, 3, 2]


def only_user(value: ir.Value) -> ir.Node | None:
    """Return the one node that reads a value; None where there are more, or it is an output."""
    users = {use.node for use in value.uses()}
    return users.pop() if len(users) == 1 and not value.is_graph_output() else None


def constant_of(value: ir.Value | None) -> Any:
    """Return the array of an initializer or Constant, None where the value is computed."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def static_shape(value: ir.Value | None) -> tuple[int, ...]:
    """Return the shape of an initializer."""
    assert value is not None
    assert value.shape is not None
    return tuple(int(size) for size in value.shape.numpy())


def producer_of(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the standard node of that type which computes a value, None where there is none."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and not node.domain else None


def both_ways(node: ir.Node) -> list[tuple[ir.Value | None, ir.Value | None]]:
    """Return both orders of a commutative node's inputs."""
    first, second = node.inputs
    return [(first, second), (second, first)]


def permutation_of(value: ir.Value | None) -> list[int] | None:
    """Return the permutation of the Transpose that computes a value, None where there is none."""
    node = producer_of(value, "Transpose")
    return None if node is None else list(node.attributes["perm"].as_ints())


def unsqueezed(value: ir.Value | None) -> ir.Value | None:
    """Return the (batch, K) value whose Unsqueeze on axis 1 this is."""
    node = producer_of(value, "Unsqueeze")
    if node is None:
        return None
    axes, source = constant_of(node.inputs[1]), node.inputs[0]
    if axes is None or axes.reshape(-1).tolist() != [1] or source is None or source.shape is None:
        return None
    return source if len(source.shape) == 2 else None


def is_row_of(row: ir.Value, x: ir.Value) -> bool:
    """Whether a row has one entry for each image and channel of x (batch, tokens, channels)."""
    if row.shape is None or x.shape is None or len(x.shape) != RANK:
        return False
    return list(row.shape) == [x.shape[0], x.shape[-1]]


def swapped_source(value: ir.Value | None) -> ir.Value | None:
    """Return k (batch, heads, tokens, size) where this is k with its last two axes swapped.

    The exporter writes the swap as Reshape, Transpose, Reshape over merged leading axes; the shapes
    are put together from that of k.
    """
    if permutation_of(value) == SWAP:
        node = producer_of(value, "Transpose")
        return None if node is None else node.inputs[0]
    outer = producer_of(value, "Reshape")
    swap = None if outer is None else producer_of(outer.inputs[0], "Transpose")
    if outer is None or swap is None or permutation_of(swap.outputs[0]) != [0, 2, 1]:
        return None
    inner = producer_of(swap.inputs[0], "Reshape")
    source = None if inner is None else inner.inputs[0]
    if inner is None or source is None:
        return None
    own_shape = all(_is_shape_of(node.inputs[1], source) for node in (inner, outer))
    return source if own_shape else None


def _is_shape_of(value: ir.Value | None, source: ir.Value) -> bool:
    """Whether a shape is a Concat of Slices of another value's Shape, and constants."""
    joined = producer_of(value, "Concat")
    if joined is None:
        return False
    for part in joined.inputs:
        if constant_of(part) is not None:
            continue
        piece = producer_of(part, "Slice")
        shape = None if piece is None else producer_of(piece.inputs[0], "Shape")
        if shape is None or shape.inputs[0] is not source:
            return False
    return True


class Branched(NamedTuple):
    """A layer with a Monarch branch of its input, and their sum, which is all that is read."""

    layer: ir.Node
    monarch: ir.Node
    total: ir.Value


def find_branches(model: ir.Model) -> Iterator[Branched]:
    """Yield the `treeq::QLinear` nodes whose branch is still a node of its own."""
    for layer in nodes_of(model, QLINEAR):
        add = only_user(layer.outputs[0])
        if add is None or add.op_type != "Add":
            continue
        for value in add.inputs:
            monarch = None if value is None else value.producer()
            if (
                monarch is not None
                and (monarch.domain, monarch.op_type) == (DOMAIN, MONARCH)
                and monarch.inputs[0] is layer.inputs[0]
                and only_user(monarch.outputs[0]) is add
            ):
                yield Branched(layer, monarch, add.outputs[0])
