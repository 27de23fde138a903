"""Q/DQ nodes only, in a float16 body, for TensorRT without our library."""

from onnx_ir.passes.common import RemoveUnusedNodesPass

from treeq_export.compile.audits.tensorrt import AUDIT_FILE
from treeq_export.compile.passes.check_formats import CheckFormats
from treeq_export.compile.passes.check_patterns import CheckPatterns
from treeq_export.compile.passes.clean_metadata import CleanMetadata
from treeq_export.compile.passes.half_body import HalfBody
from treeq_export.compile.passes.lower_monarch import LowerMonarch
from treeq_export.compile.passes.lower_native import LowerNative
from treeq_export.compile.passes.lower_weight_only import LowerWeightOnly
from treeq_export.compile.passes.merge_transposes import MergeTransposes
from treeq_export.compile.passes.name_layers import NameLayers
from treeq_export.compile.passes.narrow_inputs import NarrowInputs
from treeq_export.compile.passes.repair_squeeze import RepairSqueeze
from treeq_export.compile.passes.rewrite_einsum import RewriteEinsum
from treeq_export.compile.passes.share_subgraphs import ShareSubgraphs
from treeq_export.runners.ways import Way
from treeq_export.targets.names import TENSORRT_NATIVE
from treeq_export.targets.target import Target

TARGET = Target(
    name=TENSORRT_NATIVE,
    passes=(
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
    ways=(Way(TENSORRT_NATIVE, TENSORRT_NATIVE, int8_products=True, half=True, emulated=True),),
    audit=AUDIT_FILE,
)
