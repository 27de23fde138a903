"""Targets: each is a written list of passes over the exported graph."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass
from onnx_ir.passes.common import RemoveUnusedNodesPass

from treeq_export.compile.add_function_bodies import AddFunctionBodies
from treeq_export.compile.clean_metadata import CleanMetadata
from treeq_export.compile.fuse_attention import FuseAttention
from treeq_export.compile.fuse_branch import FuseBranch
from treeq_export.compile.fuse_modulate import FuseModulate
from treeq_export.compile.fuse_output import FuseOutput
from treeq_export.compile.lower_monarch import LowerMonarch
from treeq_export.compile.lower_qlinear import LowerQLinear
from treeq_export.compile.merge_siblings import MergeSiblings
from treeq_export.compile.name_layers import NameLayers
from treeq_export.compile.repair_squeeze import RepairSqueeze
from treeq_export.compile.share_subgraphs import ShareSubgraphs

TARGET_KEY = "treeq.target"
FP32 = "fp32"

PASSES: dict[str, tuple[InPlacePass, ...]] = {
    # The unquantized graph of the same exporter: what speed and size are compared with.
    FP32: (CleanMetadata(), RepairSqueeze(), RemoveUnusedNodesPass()),
    "portable": (
        NameLayers(),
        CleanMetadata(),
        RepairSqueeze(),
        LowerMonarch(),
        LowerQLinear(),
        RemoveUnusedNodesPass(),
    ),
    "ort": (
        NameLayers(),
        CleanMetadata(),
        RepairSqueeze(),
        ShareSubgraphs(),
        FuseBranch(),
        MergeSiblings(),
        FuseModulate(),
        FuseOutput(),
        FuseAttention(),
        RemoveUnusedNodesPass(),
        AddFunctionBodies(),
    ),
}


def lower(model: ir.Model, target: str) -> ir.Model:
    """Apply a target's passes to a freshly exported graph, in place.

    Args:
        model: What `export.export_graph` returned, or a clone of it.
        target: A key of `PASSES`.

    Returns:
        The same model.
    """
    for rewrite in PASSES[target]:
        rewrite(model)
    model.metadata_props[TARGET_KEY] = target
    return model
