"""Pass `ShareSubgraphs`: compute once what several parts of the graph compute alike.

Rules:
1. Initializers with equal contents become one.
2. Nodes with the same operator, attributes and inputs become one, but each quantized layer keeps
   its own node, which its site names.

diffusers' DiT holds a copy of the timestep and class embedder in every block; in a published
checkpoint the copies are equal. In DiT-XL/2 that is 300 MB and 27 of 28 embeddings.
"""

import hashlib

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassError, PassResult
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

from treeq_export.compile.graph.contract import LayerPass
from treeq_export.compile.graph.fused import packed_nodes
from treeq_export.compile.graph.rewrite import initializer_array
from treeq_export.compile.graph.signature import DOMAIN
from treeq_export.compile.graph.sites import read_layers

_MARK = "share_subgraphs"  # makes a node unlike all others for the time of the pass


class ShareSubgraphs(LayerPass):
    """Share initializers and nodes."""

    def call(self, model: ir.Model) -> PassResult:
        """Change the graph in place."""
        shared = _share_initializers(model.graph)
        own = [node for node in model.graph if node.domain == DOMAIN]
        for index, node in enumerate(own):
            node.attributes.add(ir.AttrInt64(_MARK, index))
        nodes = CommonSubexpressionEliminationPass()(model)
        for node in own:
            del node.attributes[_MARK]
        return PassResult(model, shared or nodes.modified)

    def ensures(self, model: ir.Model) -> None:
        """Check that each layer has its own node still."""
        lost = {site.node for site in read_layers(model)} - {n.name for n in packed_nodes(model)}
        if lost:
            raise PassError(f"{', '.join(sorted(lost))}: shares its node.")


def _share_initializers(graph: ir.Graph) -> bool:
    """Let equal initializers be one; contents are only read where type and shape are equal.

    onnx_ir's own pass for this hashes arrays that have to be contiguous; exported ones are not.
    """
    alike: dict[tuple[str, ...], list[ir.Value]] = {}
    for value in graph.initializers.values():
        if value.const_value is not None and not value.is_graph_output():
            key = (str(value.dtype), str(value.shape))
            alike.setdefault(key, []).append(value)
    modified = False
    for values in alike.values():
        first: dict[bytes, ir.Value] = {}
        for value in values if len(values) > 1 else ():
            kept = first.setdefault(_digest(value), value)
            if kept is not value:
                ir.convenience.replace_all_uses_with(value, kept)
                graph.initializers.pop(value.name or "")
                modified = True
    return modified


def _digest(value: ir.Value) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(initializer_array(value)).tobytes()).digest()
