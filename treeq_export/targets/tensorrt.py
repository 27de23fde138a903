"""`treeq` ops as plugins of TensorRT, in a float16 body."""

from onnx_ir.passes import InPlacePass
from onnx_ir.passes.common import RemoveUnusedNodesPass

from treeq_export.compile.audits.tensorrt import AUDIT_FILE
from treeq_export.compile.passes.add_branch import AddBranch
from treeq_export.compile.passes.add_function_bodies import AddFunctionBodies
from treeq_export.compile.passes.check_formats import CheckFormats
from treeq_export.compile.passes.check_patterns import CheckPatterns
from treeq_export.compile.passes.clean_metadata import CleanMetadata
from treeq_export.compile.passes.half_body import HalfBody
from treeq_export.compile.passes.lower_weight_only import LowerWeightOnly
from treeq_export.compile.passes.mark_plugins import MarkPlugins
from treeq_export.compile.passes.merge_transposes import MergeTransposes
from treeq_export.compile.passes.name_layers import NameLayers
from treeq_export.compile.passes.narrow_inputs import NarrowInputs
from treeq_export.compile.passes.repair_squeeze import RepairSqueeze
from treeq_export.compile.passes.rewrite_einsum import RewriteEinsum
from treeq_export.compile.passes.share_subgraphs import ShareSubgraphs
from treeq_export.runners.ways import Way
from treeq_export.targets.names import TENSORRT
from treeq_export.targets.target import Target


def half_body(native: bool) -> tuple[InPlacePass, ...]:
    """Return the passes that every graph for TensorRT begins with.

    Args:
        native: Whether TensorRT has to have the plan's formats itself, without a plugin.
    """
    return (
        NameLayers(),
        CleanMetadata(),
        RepairSqueeze(),
        CheckFormats(native=native),
        ShareSubgraphs(),
        RewriteEinsum(),
        MergeTransposes(),
        NarrowInputs(),
        HalfBody(),
        LowerWeightOnly(half=True),
    )


TARGET = Target(
    name=TENSORRT,
    passes=(
        *half_body(native=False),
        AddBranch(),
        MarkPlugins(),
        RemoveUnusedNodesPass(),
        CheckPatterns(),
        AddFunctionBodies(half=True),
    ),
    ways=(Way(TENSORRT, TENSORRT, packed=True, half=True, emulated=True),),
    audit=AUDIT_FILE,
)
