"""Pass `CleanMetadata`: remove what the exporter leaves about the machine it ran on.

Rules:
1. Metadata and doc strings of nodes, values and functions go (stack traces hold local paths).
2. Model metadata keeps only `treeq.` keys; the producer is treeq-export and its version.
"""

from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes import PassError, PassResult
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from treeq_export import __version__
from treeq_export.compile.graph.contract import LayerPass


class CleanMetadata(LayerPass):
    """Remove foreign metadata."""

    def call(self, model: ir.Model) -> PassResult:
        """Change the model in place."""
        kept = {k: v for k, v in model.metadata_props.items() if k.startswith("treeq.")}
        ClearMetadataAndDocStringPass()(model)
        for holder in (model, *_holders(model)):
            holder.metadata_props.clear()
            holder.doc_string = None
        model.metadata_props.update(kept)
        model.producer_name = "treeq-export"
        model.producer_version = __version__
        return PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        """Check that no local path is left in the model."""
        for name in foreign_metadata(model):
            raise PassError(f"{name}: metadata is left.")


def foreign_metadata(model: ir.Model) -> Iterator[str]:
    """Yield the name of what still carries metadata of the exporter."""
    for holder in _holders(model):
        if holder.metadata_props or holder.doc_string:
            yield str(holder.name)


def _holders(model: ir.Model) -> Iterator[ir.Graph | ir.Function | ir.Node | ir.Value]:
    functions = model.functions.values()
    yield from functions
    for graph in (model.graph, *(function.graph for function in functions)):
        yield graph
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph.all_nodes():
            yield node
            yield from node.outputs
