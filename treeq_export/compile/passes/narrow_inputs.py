"""Pass `NarrowInputs`: INT64 graph inputs become INT32.

Rules:
1. An INT64 input of the graph becomes INT32; a Cast to INT64 behind it serves its readers.

TensorRT's bindings of class labels then are what every host framework hands over without a copy.
Values beyond 2^31 are no labels, so nothing is lost.
"""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult


class NarrowInputs(InPlacePass):
    """Narrow the inputs; ensures that no graph input is INT64."""

    def call(self, model: ir.Model) -> PassResult:
        """Change the graph in place."""
        wide = [value for value in model.graph.inputs if value.dtype == ir.DataType.INT64]
        for value in wide:
            cast = ir.node(
                "Cast",
                [value],
                attributes={"to": ir.DataType.INT64.value},
                name=f"{value.name}/int64",
            )
            output = cast.outputs[0]
            output.name, output.shape = f"{value.name}/int64", value.shape
            output.type = ir.TensorType(ir.DataType.INT64)
            for use in list(value.uses()):
                if use.node is not cast:
                    use.node.replace_input_with(use.idx, output)
            value.type = ir.TensorType(ir.DataType.INT32)
            model.graph.insert_before(model.graph[0], cast)
        return PassResult(model, bool(wide))
