"""Inputs and outputs of a compiled graph, as Triton counts them: without the batch axis."""

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from treeq_export.errors import ServeError
from treeq_export.runners import graph_file
from treeq_export.runners.graph_meta import PLAN_KEY

# ONNX's name: Triton's data_type, numpy's name. Triton has no type for anything below 8 bits.
_TYPES = {
    "FLOAT": ("TYPE_FP32", "float32"),
    "FLOAT16": ("TYPE_FP16", "float16"),
    "INT64": ("TYPE_INT64", "int64"),
    "INT32": ("TYPE_INT32", "int32"),
}


@dataclass(frozen=True)
class ServedTensor:
    """One input or output of the denoiser.

    Attributes:
        name: Name of the input or output.
        data_type: Triton's name of the type.
        dtype: numpy's name of the type.
        dims: Shape of one row; (1,) where a row is a number.
        is_number: Whether a row is a number: then Triton has to drop the axis of size 1.
    """

    name: str
    data_type: str
    dtype: str
    dims: tuple[int, ...]
    is_number: bool


@dataclass(frozen=True)
class ServedGraph:
    """What a repository has to know of a compiled graph.

    Attributes:
        inputs: Inputs in order.
        output: The prediction.
        plan_sha256: Digest of the plan that it was compiled of.
        has_block_products: Whether ONNX Runtime makes MatMulNBits of a layer.
    """

    inputs: tuple[ServedTensor, ...]
    output: ServedTensor
    plan_sha256: str
    has_block_products: bool


def read_graph(path: Path) -> ServedGraph:
    """Read a compiled graph.

    Raises:
        ServeError: It is missing or damaged, or has a tensor that Triton cannot carry.
    """
    if not path.is_file():
        raise ServeError(
            f"{path}: missing. Add the target to compile.targets in the recipe and run "
            "`treeq-export run` again."
        )
    model = graph_file.read_graph(
        path, error=ServeError, remedy="Run `treeq-export compile` again."
    )
    return ServedGraph(
        inputs=tuple(_read_tensor(path, value) for value in model.graph.inputs),
        output=_read_tensor(path, model.graph.outputs[0]),
        plan_sha256=model.metadata_props.get(PLAN_KEY, ""),
        has_block_products=any(map(_dequantizes_int4, model.graph)),
    )


def _dequantizes_int4(node: ir.Node) -> bool:
    """Whether a node makes floats of an INT4 weight, see compile/passes/lower_weight_only.py."""
    weight = node.inputs[0] if node.op_type == "DequantizeLinear" else None
    return weight is not None and weight.dtype == ir.DataType.INT4


def _read_tensor(path: Path, value: ir.Value) -> ServedTensor:
    kind = "no type" if value.dtype is None else value.dtype.name
    if kind not in _TYPES:
        raise ServeError(
            f"{path}: {value.name} is {kind}, which Triton does not carry; expected one of "
            f"{', '.join(_TYPES)}. Run `treeq-export compile` again."
        )
    shape = () if value.shape is None else tuple(value.shape)[1:]
    if value.shape is None or not all(isinstance(size, int) for size in shape):
        raise ServeError(
            f"{path}: {value.name} has shape {value.shape}, expected a fixed one behind the batch. "
            "Run `treeq-export compile` again."
        )
    data_type, dtype = _TYPES[kind]
    dims = tuple(int(size) for size in shape if isinstance(size, int))
    return ServedTensor(value.name or "", data_type, dtype, dims or (1,), not dims)
