"""Nodes one after the other, with names that say which layer they belong to."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from treeq_export.quant.rotation import hadamard


class BodyWriter:
    """Records nodes under a common name prefix.

    Args:
        prefix: Put before every node and value name, such as "transformer_blocks.0.ff.net.2/".
        shared: Returns the value of a large constant by name, or None to write it as a node.
    """

    def __init__(
        self,
        prefix: str = "",
        shared: Callable[[str, NDArray[Any]], ir.Value] | None = None,
    ) -> None:
        self.tape = ir.tape.Tape()
        self.prefix = prefix
        self._shared = shared
        self._count = 0

    def op(self, op_type: str, *inputs: ir.Value, label: str = "", **attributes: Any) -> ir.Value:
        """Append a node and return its output.

        Args:
            op_type: Standard ONNX operator.
            *inputs: Inputs of the node.
            label: Name of node and value after the prefix; the operator and a number if empty.
            **attributes: Attributes of the node.
        """
        name = f"{self.prefix}{label or f'{op_type}_{self._count}'}"
        self._count += 1
        value = self.tape.op(op_type, inputs, attributes, name=name)
        value.name = name
        return value

    def split(self, value: ir.Value, count: int) -> list[ir.Value]:
        """Append a Split of the last axis into equal parts."""
        attributes = {"axis": -1, "num_outputs": count}
        name = f"{self.prefix}Split"
        return list(
            self.tape.op_multi_out("Split", [value], attributes, num_outputs=count, name=name)
        )

    def reshape(self, x: ir.Value, *shape: int, label: str = "") -> ir.Value:
        """Append a Reshape; 0 copies an axis."""
        return self.op("Reshape", x, self.constant(shape, np.int64), label=label)

    def constant(self, array: Any, dtype: Any, label: str = "") -> ir.Value:
        """Append a Constant node."""
        tensor = ir.tensor(np.asarray(array, dtype=dtype))
        return self.op("Constant", label=label, value=tensor)

    def row_like(self, row: ir.Value, number: np.generic) -> ir.Value:
        """Return (N,) of one number, as long as `row`, for a runtime to fold.

        A function body does not know N, in which the layers that share it differ.
        """
        if row.const_value is not None:
            return self.constant(np.full(row.const_value.shape.numpy(), number), number.dtype)
        shape = self.op("Shape", row)
        return self.op("ConstantOfShape", shape, value=ir.tensor(np.full(1, number)))

    def hadamard(self, group: int) -> ir.Value:
        """Return a rotation matrix, shared between layers where the graph allows it.

        A function body holds its signs as INT8, a quarter of the size, for a runtime to fold.
        """
        matrix = hadamard(group).astype(np.float32)
        if self._shared is not None:
            return self._shared(f"treeq.hadamard_{group}", matrix)
        signs = self.op("Cast", self.constant(np.sign(matrix), np.int8), to=ir.DataType.FLOAT.value)
        return self.op("Mul", signs, self.constant(matrix[0, 0], np.float32), label="hadamard")
