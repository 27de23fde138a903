"""Pass `NarrowInputs`: INT64 graph inputs become INT32.

Rules:
1. An INT64 input of the graph becomes INT32; a Cast to INT64 behind it serves its readers.

TensorRT's bindings of class labels then are what every host framework hands over without a copy.
Values beyond 2^31 are no labels, so nothing is lost.
"""

from collections.abc import Iterator

import onnx_ir as ir

from treeq_export.compile.graph.contract import RewritePass
from treeq_export.compile.graph.rewrite import add_cast


class NarrowInputs(RewritePass[ir.Value]):
    """Narrow the inputs; no graph input is INT64."""

    def _find(self, model: ir.Model) -> Iterator[ir.Value]:
        yield from (value for value in model.graph.inputs if value.dtype == ir.DataType.INT64)

    def _rewrite(self, model: ir.Model, found: ir.Value) -> None:
        readers = list(found.uses())
        wide = add_cast(model.graph, found, ir.DataType.INT64, "int64")
        for use in readers:
            use.node.replace_input_with(use.idx, wide)
        found.type = ir.TensorType(ir.DataType.INT32)
