"""The function body of `treeq::FusedQLinear`: its definition in standard operators.

Its linear and branch are written by the functions that write the bodies of QLinear and Monarch, so
there is one definition of each.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from treeq_export.compile.bodies.functions import BranchShapes, make_function, monarch_overload
from treeq_export.compile.bodies.monarch import write_monarch
from treeq_export.compile.bodies.packed import write_packed
from treeq_export.compile.bodies.writer import BodyWriter
from treeq_export.compile.graph.fused import (
    BIAS,
    BRANCH_L,
    BRANCH_R,
    FUSED,
    GATE,
    INPUTS,
    NORM_SCALE,
    NORM_SHIFT,
    PLANES,
    RESIDUAL,
    WEIGHT_SCALE,
    activation_of,
)
from treeq_export.compile.graph.match import input_of
from treeq_export.compile.graph.signature import QLinearSignature


@dataclass(frozen=True)
class FusedForm:
    """What the body of a FusedQLinear depends on.

    Attributes:
        signature: Of the linear.
        branch: Shapes of R and L, None where there is no branch.
        norm_epsilon: Of the layer normalisation, None where there is none.
        activation: "gelu_tanh" or "none".
        is_gated: Whether gate and residual follow.
        num_outputs: 1..3.
        num_inputs: Positions of the last input that is there, plus one.
    """

    signature: QLinearSignature
    branch: BranchShapes | None
    norm_epsilon: float | None
    activation: str
    is_gated: bool
    num_outputs: int
    num_inputs: int

    @property
    def overload(self) -> str:
        """Name of the function overload with this form."""
        parts = [self.signature.overload]
        if self.branch:
            parts.append(f"branch_{monarch_overload(self.branch)}")
        if self.norm_epsilon is not None:
            parts.append("norm" + self.norm_epsilon.hex().replace(".", "_").replace("+", ""))
        if self.activation != "none":
            parts.append(self.activation)
        if self.is_gated:
            parts.append("gate")
        return "_".join([*parts, f"{self.num_outputs}x{self.signature.out_features}"])


def read_form(node: ir.Node, signature: QLinearSignature, branch: BranchShapes | None) -> FusedForm:
    """Return the form of a FusedQLinear node.

    Args:
        node: The node.
        signature: Of its linear.
        branch: Shapes of its R and L, None where there is no branch.
    """
    has_norm = input_of(node, NORM_SCALE) is not None
    return FusedForm(
        signature=signature,
        branch=branch,
        norm_epsilon=node.attributes["norm_epsilon"].as_float() if has_norm else None,
        activation=activation_of(node),
        is_gated=input_of(node, GATE) is not None,
        num_outputs=len(node.outputs),
        num_inputs=len(node.inputs),
    )


def make_fused_function(form: FusedForm) -> ir.Function:
    """Return the function body of one form, with the inputs of `fused.INPUTS`."""
    inputs = [ir.Value(name=name) for name in INPUTS[: form.num_inputs]]
    writer = BodyWriter()
    x = inputs[0]
    if form.norm_epsilon is not None:
        x = _write_norm(writer, form, x, inputs[NORM_SCALE], inputs[NORM_SHIFT])
    y = _write_linear(writer, form, x, inputs)
    if form.activation == "gelu_tanh":
        y = writer.op("Gelu", y, approximate="tanh")
    if form.is_gated:
        y = writer.op("Mul", _row(writer, inputs[GATE]), y)
        y = writer.op("Add", y, inputs[RESIDUAL])
    outputs = [y] if form.num_outputs == 1 else writer.split(y, form.num_outputs)
    for index, value in enumerate(outputs):
        value.name = f"y{index + 1}"
    return make_function(FUSED, form.overload, writer, inputs, outputs)


def _row(writer: BodyWriter, value: ir.Value) -> ir.Value:
    """Append the Unsqueeze that lets a row an image meet all of its tokens."""
    return writer.op("Unsqueeze", value, writer.constant([1], np.int64))


def _write_norm(
    writer: BodyWriter, form: FusedForm, x: ir.Value, scale: ir.Value, shift: ir.Value
) -> ir.Value:
    length = writer.constant([form.signature.in_features], np.int64)
    one = ir.tensor(np.ones(1, np.float32))
    ones = writer.op("ConstantOfShape", length, value=one)
    norm = writer.op("LayerNormalization", x, ones, axis=-1, epsilon=form.norm_epsilon)
    factor = writer.op("Add", _row(writer, scale), writer.constant(1.0, np.float32))
    return writer.op("Add", writer.op("Mul", norm, factor), _row(writer, shift))


def _write_linear(
    writer: BodyWriter, form: FusedForm, x: ir.Value, inputs: list[ir.Value]
) -> ir.Value:
    bias = inputs[BIAS] if form.signature.has_bias else None
    y = write_packed(writer, x, inputs[PLANES], inputs[WEIGHT_SCALE], bias, form.signature)
    if form.branch is None:
        return y
    branch = write_monarch(writer, x, inputs[BRANCH_R], inputs[BRANCH_L], *form.branch)
    return writer.op("Add", y, branch)
