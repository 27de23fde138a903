"""Q/DQ nodes only, in a float16 body, for TensorRT without our library."""

from onnx_ir.passes.common import RemoveUnusedNodesPass

from treeq_export.compile.audits.tensorrt import AUDIT_FILE
from treeq_export.compile.passes.check_patterns import CheckPatterns
from treeq_export.compile.passes.lower_monarch import LowerMonarch
from treeq_export.compile.passes.lower_native import LowerNative
from treeq_export.runners.ways import Way
from treeq_export.targets.names import TENSORRT_NATIVE
from treeq_export.targets.target import Target
from treeq_export.targets.tensorrt import half_body

TARGET = Target(
    name=TENSORRT_NATIVE,
    passes=(
        *half_body(native=True),
        LowerMonarch(),
        LowerNative(),
        RemoveUnusedNodesPass(),
        CheckPatterns(),
    ),
    ways=(Way(TENSORRT_NATIVE, TENSORRT_NATIVE, int8_products=True, half=True, emulated=True),),
    audit=AUDIT_FILE,
)
