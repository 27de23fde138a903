"""Packed `treeq` ops for our CPU kernels, with function bodies for runtimes without them."""

from onnx_ir.passes.common import RemoveUnusedNodesPass

from treeq_export.compile.audits.onnx_runtime import AUDIT_PACKED
from treeq_export.compile.passes.add_function_bodies import AddFunctionBodies
from treeq_export.compile.passes.check_formats import CheckGrids
from treeq_export.compile.passes.clean_metadata import CleanMetadata
from treeq_export.compile.passes.fuse_attention import FuseAttention
from treeq_export.compile.passes.fuse_branch import FuseBranch
from treeq_export.compile.passes.fuse_modulate import FuseModulate
from treeq_export.compile.passes.fuse_output import FuseOutput
from treeq_export.compile.passes.merge_siblings import MergeSiblings
from treeq_export.compile.passes.name_layers import NameLayers
from treeq_export.compile.passes.repair_squeeze import RepairSqueeze
from treeq_export.compile.passes.share_subgraphs import ShareSubgraphs
from treeq_export.runners.ways import Way
from treeq_export.targets.names import ORT
from treeq_export.targets.target import Target

TARGET = Target(
    name=ORT,
    passes=(
        NameLayers(),
        CleanMetadata(),
        RepairSqueeze(),
        CheckGrids(),
        ShareSubgraphs(),
        FuseBranch(),
        MergeSiblings(),
        FuseModulate(),
        FuseOutput(),
        FuseAttention(),
        RemoveUnusedNodesPass(),
        AddFunctionBodies(half=False),
    ),
    ways=(Way(ORT, ORT, kernels=True, packed=True), Way("ort_body", ORT, packed=True)),
    audit=AUDIT_PACKED,
)
