"""Whether ONNX Runtime's 8-bit products are exact on this processor, found by trying.

x86 without VNNI has one instruction for UINT8 times INT8, which adds pairs of products in 16 bits
and saturates.
"""

from functools import cache

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from treeq_export.ops import OPSET
from treeq_served.ort_session import open_session

_ROWS, _K, _N = 4, 64, 16
LARGEST_SUM = _K * 255 * 127


def make_product() -> tuple[bytes, NDArray[np.uint8]]:
    """Return a model of one UINT8 by INT8 product, x -> y, and an x for which y is LARGEST_SUM."""
    x = ir.val("x", ir.DataType.UINT8, [_ROWS, _K])
    weight = ir.val("w", const_value=ir.tensor(np.full((_K, _N), 127, np.int8), name="w"))
    product = ir.node("MatMulInteger", [x, weight])
    y = product.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.INT32), ir.Shape([_ROWS, _N])
    graph = ir.Graph(
        [x], [y], nodes=[product], initializers=[weight], opset_imports={"": OPSET}, name="product"
    )
    serialized = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return serialized, np.full((_ROWS, _K), 255, np.uint8)


@cache
def products_saturate() -> bool:
    """Whether sums of UINT8 codes times INT8 weights of 8 bits are wrong in ONNX Runtime here."""
    model, x = make_product()
    [sums] = open_session(model, None, threads=1).run(None, {"x": x})
    return bool(np.any(sums != LARGEST_SUM))
