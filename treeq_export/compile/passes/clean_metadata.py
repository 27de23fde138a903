"""Pass `CleanMetadata`: remove what the exporter leaves about the machine it ran on.

Rules:
1. Metadata and doc strings of nodes, values and functions go (stack traces hold local paths).
2. Model metadata keeps only `treeq.` keys; the producer is treeq-export and its version.
"""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from treeq_export import __version__


class CleanMetadata(InPlacePass):
    """Remove foreign metadata; ensures that no local path is left in the model."""

    def call(self, model: ir.Model) -> PassResult:
        """Change the model in place."""
        kept = {k: v for k, v in model.metadata_props.items() if k.startswith("treeq.")}
        ClearMetadataAndDocStringPass()(model)
        graphs = (model.graph, *(function.graph for function in model.functions.values()))
        values = [
            value
            for graph in graphs
            for value in (
                *graph.inputs,
                *graph.initializers.values(),
                *(output for node in graph.all_nodes() for output in node.outputs),
            )
        ]
        for holder in (model, *graphs, *model.functions.values(), *values):
            holder.metadata_props.clear()
            holder.doc_string = None
        model.metadata_props.update(kept)
        model.producer_name = "treeq-export"
        model.producer_version = __version__
        return PassResult(model, True)
