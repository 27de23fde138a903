"""Pass `NarrowInputs`: INT64 graph inputs become INT32.

Rules:
1. An INT64 input of the graph becomes INT32; a Cast to INT64 behind it serves its readers.

TensorRT's bindings of class labels then are what every host framework hands over without a copy.
Values beyond 2^31 are no labels, so nothing is lost.
"""

from collections.abc import Iterator

import onnx_ir as ir

from treeq_export.compile.graph.contract import RewritePass

_WIDE, _NARROW = ir.DataType.INT64, ir.DataType.INT32


class NarrowInputs(RewritePass[ir.Value]):
    """Narrow the inputs; no graph input is INT64."""

    def _find(self, model: ir.Model) -> Iterator[ir.Value]:
        yield from (value for value in model.graph.inputs if value.dtype == _WIDE)

    def _rewrite(self, model: ir.Model, found: ir.Value) -> None:
        name = f"{found.name}/int64"
        cast = ir.node("Cast", [found], attributes={"to": _WIDE.value}, name=name)
        output = cast.outputs[0]
        output.name, output.shape, output.type = name, found.shape, ir.TensorType(_WIDE)
        for use in found.uses():
            if use.node is not cast:
                use.node.replace_input_with(use.idx, output)
        found.type = ir.TensorType(_NARROW)
        model.graph.insert_before(model.graph[0], cast)
