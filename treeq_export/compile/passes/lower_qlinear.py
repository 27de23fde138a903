"""Pass `LowerQLinear`: `treeq::QLinear` to standard ONNX with INT4, INT8 or UINT8 weights.

Rules:
1. The planes become `<layer>.weight_quantized`, transposed to (K, N): INT4 up to 4 bits, followed
   by a Cast to INT8 that a runtime folds at load; INT8 above, or UINT8 with the zero point 128
   where INT8 products could saturate (`zero_points`).
2. The scales become `<layer>.weight_quantized_scale`, (N,), or (G, 1, N) with several per channel.
3. The node becomes the form of bodies/qlinear.py; the output keeps its name, type and shape.
"""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult

from treeq_export.compile.bodies.qlinear import BodyWriter, write_qlinear, zero_points
from treeq_export.compile.graph.signature import (
    DOMAIN,
    QLINEAR,
    QLinearSignature,
    layer_name,
    nodes_of,
    read_signature,
)
from treeq_export.quant.packing import unpack
from treeq_export.quant.rotation import hadamard

_INT4_BITS = 4


class LowerQLinear(InPlacePass):
    """Rewrite every `treeq::QLinear` of the graph; ensures that none is left."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the graph in place."""
        nodes = nodes_of(model, QLINEAR)
        for node in nodes:
            _lower(model.graph, node)
        if nodes and not any(node.domain == DOMAIN for node in model.graph):
            model.graph.opset_imports.pop(DOMAIN, None)
        return PassResult(model, bool(nodes))


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


def _weight_value(
    graph: ir.Graph,
    writer: BodyWriter,
    name: str,
    codes: NDArray[np.int8],
    signature: QLinearSignature,
) -> ir.Value:
    if signature.weight_bits > _INT4_BITS:
        zero = zero_points(signature).weight
        return add_initializer(graph, name, (codes.astype(np.int16) + zero).astype(zero.dtype))
    stored = add_initializer(graph, name, codes.astype(ml_dtypes.int4))
    return writer.op("Cast", stored, to=ir.DataType.INT8.value)


def _lower(graph: ir.Graph, node: ir.Node) -> None:
    signature: QLinearSignature = read_signature(node)
    name = layer_name(node)
    x, planes, scale = node.inputs[0], node.inputs[1], node.inputs[2]
    assert x is not None
    writer = BodyWriter(f"{name}/", lambda key, array: add_initializer(graph, key, array))
    codes = np.ascontiguousarray(unpack(initializer_array(planes), signature.in_features).T)
    scales = np.ascontiguousarray(initializer_array(scale).T)
    if signature.num_groups > 1:
        codes = codes.reshape(signature.num_groups, signature.group_size, -1)
        scales = scales[:, None, :]
    else:
        scales = scales[0]
    weight = _weight_value(graph, writer, f"{name}.weight_quantized", codes, signature)
    bias = node.inputs[3] if signature.has_bias else None
    y = write_qlinear(
        writer,
        x,
        weight,
        add_initializer(graph, f"{name}.weight_quantized_scale", scales),
        bias,
        signature,
        hadamard(signature.rotation_group).astype(np.float32),
    )
    replace_node(graph, node, writer, y)


def replace_node(graph: ir.Graph, node: ir.Node, writer: BodyWriter, y: ir.Value) -> None:
    """Put a writer's nodes in the place of `node`; `y` takes over its output's name and type."""
    old = node.outputs[0]
    y.type, y.shape = old.type, old.shape
    name = old.name
    ir.convenience.replace_nodes_and_values(graph, node, [node], writer.tape.nodes, [old], [y])
    y.name = name
