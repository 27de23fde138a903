"""The quantized layer and the ops that compute it: what kernels, graphs and plugins share.

`LayerFormat` is all that a kernel has to know of a layer beside its tensors. `QLINEAR`, `FUSED` and
`MONARCH` are the ops of the ONNX domain `treeq`; an op's name is its ONNX op type, its TensorRT
plugin and its kernel. kernels/write_op_header.py writes kernels/include/treeq/op.h from this file.

Only the standard library is imported, so that kernels are built without the package's dependencies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Self, TypeVar

OPSET = 21  # of ONNX's own operators, in every graph and function body
DOMAIN = "treeq"
VERSION = 1
PLUGIN_VERSION = str(VERSION)
# Attributes of a node that a TensorRT parser reads: without them it imports the function body.
PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": PLUGIN_VERSION}

MIN_BITS, MAX_BITS = 2, 8
PACK_WORD = 32  # channels of a word of a bit plane
MAX_ROTATION = 128  # a larger one gains next to nothing, and GPU kernels have none
# On the GPU, a sum of K products of two bytes has to stay below 2^31; the bytes are at most 128.
MAX_IN_FEATURES = 130_944
# From this width on, the grid of a token's largest value costs less than the tails beyond the grid
# of its rms, and has nothing to gain from clipping.
ABSMAX_FROM_BITS = 7

ACTIVATIONS = ("none", "gelu_tanh")  # a kernel's number of an activation function is its place here

_T = TypeVar("_T")


class ActScale(StrEnum):
    """How the scale of a layer's activation codes is found.

    Attributes:
        number: The kernels' name for it, in C++ and in the Triton language.
    """

    number: int

    TOKEN_RMS = "token_rms", 1
    TOKEN_ABSMAX = "token_absmax", 2
    TENSOR_STATIC = "tensor_static", 3
    NONE = "none", 0

    def __new__(cls, text: str, number: int) -> Self:
        """Make a member that is the text and has a number."""
        member = str.__new__(cls, text)
        member._value_ = text
        member.number = number
        return member

    @property
    def statistic(self) -> str:
        """The short name in a kernel's name: "rms", "absmax" or "static"."""
        return self.value.rpartition("_")[2]

    @property
    def is_static(self) -> bool:
        """Whether one calibrated scale holds for the whole tensor."""
        return self is ActScale.TENSOR_STATIC

    @staticmethod
    def for_bits(bits: int) -> "ActScale":
        """Return the scale per token that loses least at `bits` per code."""
        return ActScale.TOKEN_ABSMAX if bits >= ABSMAX_FROM_BITS else ActScale.TOKEN_RMS

    def has_trainable_step(self, bits: int) -> bool:
        """Whether another step than the calibrated one may lose less, at `bits` per code."""
        return self is not ActScale.TOKEN_ABSMAX or bits < ABSMAX_FROM_BITS


ACT_SCALES = tuple(scale for scale in ActScale if scale is not ActScale.NONE)


@dataclass(frozen=True)
class LayerFormat:
    """Formats and sizes of a quantized linear: the ops' attributes, in their order.

    Attributes:
        weight_bits: Bits per weight code, 2..8.
        act_bits: Bits per activation code, 2..8; 0 where activations are not quantized.
        act_scale: How the activation's scale is found.
        act_step: The layer's step; the scale itself where it is static.
        rotation_group: Power of two that divides in_features; 1 is no rotation.
        group_size: Input channels per weight scale; 0 is one scale per output channel.
        in_features: K.
        out_features: N.
    """

    weight_bits: int
    act_bits: int
    act_scale: ActScale
    act_step: float
    rotation_group: int
    group_size: int
    in_features: int
    out_features: int

    @classmethod
    def from_attributes(cls, values: Mapping[str, Any], **more: Any) -> Self:
        """Return the format that a node or a plugin carries.

        Args:
            values: Attributes by name; those of no field are ignored.
            more: Fields that a subclass adds.
        """
        named: dict[str, Any] = {name: values[name] for name in LAYER_ATTRIBUTES}
        named["act_scale"] = ActScale(named["act_scale"])
        return cls(**named, **more)

    @property
    def codes_key(self) -> tuple[int, ActScale, float, int]:
        """What layers that read the same x have to agree in to read the same codes of it."""
        return self.act_bits, self.act_scale, self.act_step, self.rotation_group

    @property
    def code_range(self) -> tuple[int, int]:
        """The smallest and the largest activation code."""
        half = 1 << self.act_bits >> 1
        return -half, half - 1

    def attributes(self) -> dict[str, Any]:
        """Return the attributes of a node: integers, one number and one text, in order."""
        return {name: kind(getattr(self, name)) for name, kind in LAYER_ATTRIBUTES.items()}

    @property
    def num_groups(self) -> int:
        """Weight scales per output channel."""
        return self.in_features // self.group_size if self.group_size else 1


# Attributes that carry a LayerFormat, by name: int, float or str.
LAYER_ATTRIBUTES: dict[str, type] = {
    one.name: str if one.type is ActScale else one.type
    for one in fields(LayerFormat)
    if isinstance(one.type, type)
}


@dataclass(frozen=True)
class OpDefinition:
    """One op.

    Attributes:
        name: ONNX op type, plugin name and kernel name.
        inputs: Names of all inputs, optional ones last.
        num_required: Number of inputs that have to be given.
        attributes: Type of each attribute by name: int, float or str.
        num_outputs: Largest number of outputs.
    """

    name: str
    inputs: tuple[str, ...]
    num_required: int
    attributes: Mapping[str, type] = field(hash=False)
    num_outputs: int = 1

    def position(self, name: str) -> int:
        """Return the position of an input."""
        return self.inputs.index(name)

    def pick(self, values: Sequence[_T | None], name: str) -> _T | None:
        """Return the input of a name out of a call's inputs, None where it is left out."""
        at = self.position(name)
        return values[at] if at < len(values) else None


_LINEAR = ("x", "planes", "weight_scale", "bias")
# y = x W^T + bias + addend. The addend (..., N), such as a Monarch branch, is added in float32.
QLINEAR = OpDefinition("QLinear", (*_LINEAR, "addend"), 3, LAYER_ATTRIBUTES)
# A quantized linear with what surrounds it in a Diffusion Transformer, see compile/graph/fused.py.
FUSED = OpDefinition(
    "FusedQLinear",
    (
        *_LINEAR,
        "branch_R",
        "branch_L",
        "norm_scale",
        "norm_shift",
        "gate",
        "residual",
    ),
    3,
    LAYER_ATTRIBUTES | {"activation": str, "norm_epsilon": float},
    num_outputs=3,
)
MONARCH = OpDefinition("Monarch", ("x", "R", "L"), 3, {})
OPS = (QLINEAR, FUSED, MONARCH)
PLUGINS = (QLINEAR, MONARCH)  # what TensorRT has plugins for
