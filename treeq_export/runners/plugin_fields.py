"""Attributes of an op as the fields of a TensorRT plugin, and back."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from treeq_export.errors import RunnerError
from treeq_export.ops import OpDefinition

# TensorRT has no bool and no int64 fields: integers are int32 there, text is char.
_TYPES: dict[type, tuple[str, Any]] = {
    int: ("INT32", np.int32),
    float: ("FLOAT32", np.float32),
    str: ("CHAR", np.int8),
}


def pack_field(kind: type, value: float | str) -> np.ndarray[Any, Any]:
    """Return a field's value as the array TensorRT stores; text ends with a NUL, as ONNX gives it.

    >>> pack_field(str, "rms").tolist()
    [114, 109, 115, 0]
    """
    if isinstance(value, str):
        return np.frombuffer(value.encode() + b"\0", np.int8).copy()
    return np.array([value], _TYPES[kind][1])


def unpack_fields(op: OpDefinition, fields: Mapping[str, Any]) -> dict[str, int | float | str]:
    """Return the values of a node's fields.

    Args:
        op: The op.
        fields: Arrays by field name, as TensorRT hands them over.

    Raises:
        RunnerError: One is missing.
    """
    missing = [name for name in op.attributes if name not in fields]
    if missing:
        raise RunnerError(
            f"{op.name}: the node lacks {', '.join(missing)}. Compile the graph again with this "
            "treeq-export."
        )
    values: dict[str, int | float | str] = {}
    for name, kind in op.attributes.items():
        array = np.asarray(fields[name])
        text = kind is str
        values[name] = array.tobytes().split(b"\0")[0].decode() if text else kind(array.flat[0])
    return values


def field_type(trt: Any, kind: type) -> Any:
    """Return a kind, int, float or str, as TensorRT's PluginFieldType."""
    return getattr(trt.PluginFieldType, _TYPES[kind][0])
