"""Targets: each is a written list of passes over the exported graph."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass
from onnx_ir.passes.common import RemoveUnusedNodesPass

from treeq_export.compile.passes.add_branch import AddBranch
from treeq_export.compile.passes.add_function_bodies import AddFunctionBodies
from treeq_export.compile.passes.add_plugin_bodies import AddPluginBodies
from treeq_export.compile.passes.check_formats import CheckFormats
from treeq_export.compile.passes.check_patterns import CheckPatterns
from treeq_export.compile.passes.clean_metadata import CleanMetadata
from treeq_export.compile.passes.fuse_attention import FuseAttention
from treeq_export.compile.passes.fuse_branch import FuseBranch
from treeq_export.compile.passes.fuse_modulate import FuseModulate
from treeq_export.compile.passes.fuse_output import FuseOutput
from treeq_export.compile.passes.half_body import HalfBody
from treeq_export.compile.passes.lower_monarch import LowerMonarch
from treeq_export.compile.passes.lower_native import LowerNative
from treeq_export.compile.passes.lower_qlinear import LowerQLinear
from treeq_export.compile.passes.lower_weight_only import LowerWeightOnly
from treeq_export.compile.passes.mark_plugins import MarkPlugins
from treeq_export.compile.passes.merge_siblings import MergeSiblings
from treeq_export.compile.passes.merge_transposes import MergeTransposes
from treeq_export.compile.passes.name_layers import NameLayers
from treeq_export.compile.passes.narrow_inputs import NarrowInputs
from treeq_export.compile.passes.repair_squeeze import RepairSqueeze
from treeq_export.compile.passes.rewrite_einsum import RewriteEinsum
from treeq_export.compile.passes.share_subgraphs import ShareSubgraphs
from treeq_export.runners.graph_meta import TARGET_KEY
from treeq_export.targets.names import FP32, TENSORRT, TENSORRT_NATIVE

PASSES: dict[str, tuple[InPlacePass, ...]] = {
    # The unquantized graph of the same exporter: what speed and size are compared with.
    FP32: (CleanMetadata(), RepairSqueeze(), RemoveUnusedNodesPass()),
    "portable": (
        NameLayers(),
        CleanMetadata(),
        RepairSqueeze(),
        LowerMonarch(),
        LowerWeightOnly(half=False),
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
    # `treeq` ops as plugins in a float16 body.
    TENSORRT: (
        NameLayers(),
        CleanMetadata(),
        RepairSqueeze(),
        CheckFormats(native=False),
        ShareSubgraphs(),
        RewriteEinsum(),
        MergeTransposes(),
        NarrowInputs(),
        HalfBody(),
        LowerWeightOnly(half=True),
        AddBranch(),
        MarkPlugins(),
        RemoveUnusedNodesPass(),
        CheckPatterns(),
        AddPluginBodies(),
    ),
    # Q/DQ only, in a float16 body.
    TENSORRT_NATIVE: (
        NameLayers(),
        CleanMetadata(),
        RepairSqueeze(),
        CheckFormats(native=True),
        ShareSubgraphs(),
        RewriteEinsum(),
        MergeTransposes(),
        NarrowInputs(),
        HalfBody(),
        LowerWeightOnly(half=True),
        LowerMonarch(),
        LowerNative(),
        RemoveUnusedNodesPass(),
        CheckPatterns(),
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
