"""The unquantized graph of the same exporter: what speed and size are compared with."""

from onnx_ir.passes.common import RemoveUnusedNodesPass

from treeq_export.compile.passes.clean_metadata import CleanMetadata
from treeq_export.compile.passes.repair_squeeze import RepairSqueeze
from treeq_export.runners.ways import Way
from treeq_export.targets.names import FP32
from treeq_export.targets.target import Target

TARGET = Target(
    name=FP32,
    passes=(CleanMetadata(), RepairSqueeze(), RemoveUnusedNodesPass()),
    ways=(Way(FP32, FP32),),
    audit=None,
)
