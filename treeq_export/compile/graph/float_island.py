"""Which nodes of a denoiser have to stay float32 when its body becomes float16.

Rules:
1. The timestep's sinusoid: Sin, Cos and everything they are computed from. Timesteps reach 1000 and
   are multiplied by frequencies; float16 has 11 bits.
2. Powers, whose squares and cubes overflow float16 from 256 and 40 on: Pow, and what follows it by
   elementwise arithmetic and means up to the function that bounds it again: Reciprocal or Div of an
   RMS norm, Tanh or Erf of a decomposed GELU.
3. Range, whose float16 form no runtime has.
"""

import onnx_ir as ir

_SOURCES = frozenset({"Sin", "Cos"})
_POWERS = frozenset({"Pow", "ReduceSumSquare", "ReduceL2"})
_CARRIED = frozenset({"Add", "Sub", "Mul", "Sqrt", "ReduceMean", "ReduceSum", "Neg"})
_BOUNDED = frozenset({"Reciprocal", "Div", "Tanh", "Erf", "Sigmoid"})
_ALWAYS = frozenset({"Range"})


def find_float_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Return the nodes that stay float32."""
    found = {node for node in graph if node.op_type in _ALWAYS and not node.domain}
    found |= _upstream([node for node in graph if node.op_type in _SOURCES and not node.domain])
    for node in graph:
        if node.op_type in _POWERS and not node.domain:
            found |= _until_bounded(node)
    return found


def _upstream(nodes: list[ir.Node]) -> set[ir.Node]:
    found: set[ir.Node] = set()
    while nodes:
        node = nodes.pop()
        if node not in found:
            found.add(node)
            producers = [value.producer() for value in node.inputs if value is not None]
            nodes += [producer for producer in producers if producer is not None]
    return found


def _until_bounded(node: ir.Node) -> set[ir.Node]:
    found: set[ir.Node] = set()
    nodes = [node]
    while nodes:
        node = nodes.pop()
        if node in found:
            continue
        found.add(node)
        if node.op_type in _BOUNDED:
            continue
        for output in node.outputs:
            readers = [use.node for use in output.uses()]
            nodes += [reader for reader in readers if reader.op_type in _CARRIED | _BOUNDED]
    return found
