"""What Triton's interpreter computes wrongly and our kernels need: bf16.

It keeps bf16 as 16-bit integers and multiplies those in `tl.dot`, and cuts fp32 to bf16.
On a GPU nothing of this applies.
"""

from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray


def bf16_from_float32(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bit patterns of x rounded to bf16, half to even.

    >>> bf16_from_float32(np.array([1.0, 1.00390625, 1.01171875], np.float32)).tolist()
    [16256, 16256, 16258]
    """
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def repair_bf16() -> None:
    """Make `tl.dot` and the conversion to bf16 right in the interpreter of this process."""
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "treeq_bf16", False):
        return
    wrong_dot, wrong_cast = builder.create_dot, builder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(bf16_from_float32(src.data), tl.bfloat16)
        return wrong_cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (wrong_cast(self, operand, tl.float32) for operand in (a, b))
        return wrong_dot(self, a, b, *rest)

    builder.cast_impl, builder.create_dot, builder.treeq_bf16 = cast_impl, create_dot, True
