"""Attributes of an op as the fields of a TensorRT plugin, and back."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from treeq_export.errors import RunnerError
from treeq_export.runners.op_definition import FieldType, OpDefinition

_NUMPY_TYPES: dict[FieldType, Any] = {"int32": np.int32, "float32": np.float32, "char": np.int8}


def pack_field(kind: FieldType, value: float | str) -> np.ndarray[Any, Any]:
    """Return a field's value as the array TensorRT stores; text ends with a NUL, as ONNX gives it.

    >>> pack_field("char", "rms").tolist()
    [114, 109, 115, 0]
    """
    if isinstance(value, str):
        return np.frombuffer(value.encode() + b"\0", np.int8).copy()
    return np.array([value], _NUMPY_TYPES[kind])


def unpack_fields(op: OpDefinition, fields: Mapping[str, Any]) -> dict[str, int | float | str]:
    """Return the values of a node's fields.

    Args:
        op: The op.
        fields: Arrays by field name, as TensorRT hands them over.

    Raises:
        RunnerError: One is missing.
    """
    missing = [field.name for field in op.fields if field.name not in fields]
    if missing:
        raise RunnerError(
            f"{op.name}: the node lacks {', '.join(missing)}. Compile the graph again with this "
            "treeq-export."
        )
    values: dict[str, int | float | str] = {}
    for field in op.fields:
        array = np.asarray(fields[field.name])
        if field.type == "char":
            values[field.name] = array.tobytes().split(b"\0")[0].decode()
        else:
            value = array.reshape(-1)[0]
            values[field.name] = int(value) if field.type == "int32" else float(value)
    return values


def field_type(trt: Any, kind: FieldType) -> Any:
    """Return a kind as TensorRT's PluginFieldType."""
    names = {"int32": "INT32", "float32": "FLOAT32", "char": "CHAR"}
    return getattr(trt.PluginFieldType, names[kind])
