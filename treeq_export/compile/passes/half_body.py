"""Pass `HalfBody`: the float32 graph becomes float16, with casts where the two meet.

Rules:
1. Graph inputs and outputs keep their types; a Cast stands behind an input and before an output,
   which keeps its name.
2. The nodes of compile/graph/float_island.py stay float32.
3. A `treeq` op reads x, addend and branch factors in float16 and writes float16; its scales and
   bias stay float32, since they multiply an int32 sum.
4. Initializers and Constants follow their readers; one that both kinds read is stored twice. Finite
   numbers beyond float16 (a mask's "minus infinity") become its largest.
5. Cast and ConstantOfShape to float32 are to float16.

The result is strongly typed: all float inputs of a node have one type.
"""

import onnx_ir as ir
from onnx_ir.passes import PassResult

from treeq_export.compile.graph.contract import LayerPass, refuse
from treeq_export.compile.graph.float_island import find_float_nodes
from treeq_export.compile.graph.rewrite import add_cast, add_initializer
from treeq_export.compile.graph.signature import DOMAIN, QLINEAR
from treeq_export.compile.graph.value_types import FLOAT, HALF, half_array

# Inputs of a QLinear that stay float32: weight_scale and bias.
_FLOAT_INPUTS = (2, 3)
# Operators whose output type does not follow from their input's.
_ANY_TYPE = frozenset({"Cast", "Shape", "Size"})


class HalfBody(LayerPass):
    """Turn the body to float16."""

    def requires(self, model: ir.Model) -> None:
        """Check that no layer is lowered yet: the types around Q/DQ are its own matter."""
        lowered = (node for node in model.graph if node.op_type == "DequantizeLinear")
        refuse(lowered, "is lowered already.")

    def call(self, model: ir.Model) -> PassResult:
        """Change the graph in place."""
        _Halver(model.graph).run()
        return PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        """Check that every standard node is of one floating-point type."""
        standard = (n for n in model.graph if not n.domain and n.op_type not in _ANY_TYPE)
        mixed = (n for n in standard if {FLOAT, HALF} <= {v.dtype for v in n.inputs if v})
        refuse(mixed, "reads float16 and float32.")


class _Halver:
    """One run of the pass: which nodes stay float32, and the twins made so far."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._float_nodes = find_float_nodes(graph)
        self._twins: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        nodes, outputs = list(self._graph), list(self._graph.outputs)
        for node in nodes:
            if node not in self._float_nodes:
                self._halve(node)
        for node in nodes:
            self._connect(node)
        for output in outputs:
            self._restore_output(output)
        self._remove_unread()

    def _halve(self, node: ir.Node) -> None:
        """Set a node's own types: outputs and type attributes."""
        if node.op_type == "Cast" and node.attributes["to"].as_int() == FLOAT.value:
            node.attributes.add(ir.AttrInt64("to", HALF.value))
        elif node.op_type in ("Constant", "ConstantOfShape") and "value" in node.attributes:
            tensor = node.attributes["value"].as_tensor()
            if tensor.dtype == FLOAT:
                node.attributes.add(ir.AttrTensor("value", ir.tensor(half_array(tensor))))
        for output in node.outputs:
            if output.dtype == FLOAT:
                output.type = ir.TensorType(HALF)
                if output.const_value is not None:
                    output.const_value = ir.tensor(half_array(output.const_value))

    def _connect(self, node: ir.Node) -> None:
        """Let each input of a node have the type that the node wants."""
        for position, value in enumerate(node.inputs):
            if value is None or value.dtype not in (FLOAT, HALF) or node.op_type in _ANY_TYPE:
                continue
            wanted = FLOAT if self._wants_float(node, position) else HALF
            if value.dtype != wanted:
                node.replace_input_with(position, self._twin(value))

    def _wants_float(self, node: ir.Node, position: int) -> bool:
        if node in self._float_nodes:
            return True
        is_layer = node.domain == DOMAIN and node.op_type == QLINEAR
        return is_layer and position in _FLOAT_INPUTS

    def _twin(self, value: ir.Value) -> ir.Value:
        """Return the same value in the other type: an initializer's copy, or a Cast."""
        if value not in self._twins:
            if value.is_initializer() and not value.is_graph_input():
                assert value.const_value is not None
                half = half_array(value.const_value)
                self._twins[value] = add_initializer(self._graph, f"{value.name}/half", half)
            elif value.dtype == FLOAT:
                self._twins[value] = add_cast(self._graph, value, HALF, "half")
            else:
                self._twins[value] = add_cast(self._graph, value, FLOAT, "float")
        return self._twins[value]

    def _restore_output(self, output: ir.Value) -> None:
        """Put a Cast to float32 before a graph output that became float16."""
        if output.dtype != HALF:
            return
        name = output.name
        cast = add_cast(self._graph, output, FLOAT, "float")
        index = self._graph.outputs.index(output)
        self._graph.outputs[index] = cast
        output.name, cast.name = f"{name}/half", name

    def _remove_unread(self) -> None:
        """Remove initializers that lost their readers; a twin without rival takes the name."""
        for value, twin in self._twins.items():
            if value.is_initializer() and not value.uses() and not value.is_graph_output():
                assert value.name is not None
                name = value.name
                del self._graph.initializers[name]
                twin.name = name
