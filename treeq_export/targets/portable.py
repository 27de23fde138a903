"""Standard ONNX operators only, for any ONNX runtime."""

from onnx_ir.passes.common import RemoveUnusedNodesPass

from treeq_export.compile.audits.onnx_runtime import AUDIT_RUNTIME
from treeq_export.compile.passes.clean_metadata import CleanMetadata
from treeq_export.compile.passes.lower_monarch import LowerMonarch
from treeq_export.compile.passes.lower_qlinear import LowerQLinear
from treeq_export.compile.passes.lower_weight_only import LowerWeightOnly
from treeq_export.compile.passes.name_layers import NameLayers
from treeq_export.compile.passes.repair_squeeze import RepairSqueeze
from treeq_export.runners.ways import Way
from treeq_export.targets.names import PORTABLE
from treeq_export.targets.target import Target

TARGET = Target(
    name=PORTABLE,
    passes=(
        NameLayers(),
        CleanMetadata(),
        RepairSqueeze(),
        LowerMonarch(),
        LowerWeightOnly(half=False),
        LowerQLinear(),
        RemoveUnusedNodesPass(),
    ),
    ways=(Way(PORTABLE, PORTABLE),),
    audit=AUDIT_RUNTIME,
)
