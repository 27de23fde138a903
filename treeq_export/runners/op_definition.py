"""What `treeq::QLinear` and `treeq::Monarch` are, once for every host.

ONNX op type = TensorRT plugin name = kernel file. The ONNX graphs, the TensorRT plugins in C++ and
in Python, and the tests take name, version, namespace, inputs and fields from here or are compared
with it. TensorRT has no bool and no int64 fields: integers are int32 there, text is char.
"""

from dataclasses import dataclass
from typing import Literal

NAMESPACE = "treeq"
VERSION = "1"
# Attributes of a node that a TensorRT parser reads: without them it imports the function body.
PLUGIN_ATTRIBUTES = {"plugin_namespace": NAMESPACE, "plugin_version": VERSION}

FieldType = Literal["int32", "float32", "char"]


@dataclass(frozen=True)
class Field:
    """One attribute of an op.

    Attributes:
        name: As in the ONNX node.
        type: Its type as a TensorRT plugin field.
    """

    name: str
    type: FieldType


@dataclass(frozen=True)
class OpDefinition:
    """One op.

    Attributes:
        name: ONNX op type and plugin name.
        inputs: Names of all inputs, optional ones last.
        num_required: How many inputs have to be there.
        fields: Attributes, in the order of the plugin's field list.
    """

    name: str
    inputs: tuple[str, ...]
    num_required: int
    fields: tuple[Field, ...]


QLINEAR_OP = OpDefinition(
    name="QLinear",
    # addend, (..., N): what is added to the product in the epilogue, such as a Monarch branch.
    inputs=("x", "planes", "weight_scale", "bias", "addend"),
    num_required=3,
    fields=(
        Field("weight_bits", "int32"),
        Field("act_bits", "int32"),
        Field("act_scale", "char"),
        Field("act_step", "float32"),
        Field("rotation_group", "int32"),
        Field("group_size", "int32"),
        Field("in_features", "int32"),
        Field("out_features", "int32"),
    ),
)
MONARCH_OP = OpDefinition(name="Monarch", inputs=("x", "R", "L"), num_required=3, fields=())
OPS = (QLINEAR_OP, MONARCH_OP)
