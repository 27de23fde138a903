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
        for holder in (model, model.graph):
            holder.metadata_props.clear()
        for value in (*model.graph.inputs, *model.graph.initializers.values()):
            value.metadata_props.clear()
        model.metadata_props.update(kept)
        model.producer_name = "treeq-export"
        model.producer_version = __version__
        return PassResult(model, True)
