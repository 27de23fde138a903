"""The function bodies of `treeq` ops in standard operators, so that any runtime can run a file.

In a float16 body, a function computes in float32 between Casts, with the addend added before the
last one, as the kernels do; plugin_namespace and plugin_version are then declared as attributes of
the function, since TensorRT takes its plugin for a node that has them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from treeq_export.compile.bodies.monarch import write_monarch
from treeq_export.compile.bodies.packed import write_packed
from treeq_export.compile.bodies.writer import BodyWriter
from treeq_export.compile.graph.fused import activation_of
from treeq_export.compile.graph.match import static_shape
from treeq_export.compile.graph.signature import QLinearSignature, read_signature
from treeq_export.compile.graph.value_types import FLOAT, HALF
from treeq_export.ops import (
    DOMAIN,
    FUSED,
    MONARCH,
    OPS,
    OPSET,
    PLUGIN_ATTRIBUTES,
    QLINEAR,
    OpDefinition,
)
from treeq_export.runners.plain_layer import BRANCH_FUNCTION, LINEAR_FUNCTION, input_of

_FULL = ("planes", "weight_scale", "bias")  # inputs that are no float16 in a float16 body


@dataclass(frozen=True)
class Form:
    """What the body of a node depends on.

    Attributes:
        op: The node's op.
        signature: Formats and sizes of the linear; None of a Monarch.
        num_inputs: Position of the last input that is given, plus one.
        branch: Shapes of R and L, None where there is no branch.
        norm_epsilon: Epsilon of the layer normalisation, None where there is none.
        activation: "gelu_tanh" or "none".
        is_gated: Whether gate and residual follow.
        num_outputs: Number of outputs, 1..3.
        half: Whether the node stands in a float16 body.
    """

    op: OpDefinition
    signature: QLinearSignature | None
    num_inputs: int
    branch: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    norm_epsilon: float | None = None
    activation: str = "none"
    is_gated: bool = False
    num_outputs: int = 1
    half: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return self.op.inputs[: self.num_inputs]

    @property
    def overload(self) -> str:
        """Name of the function overload with this form."""
        parts = []
        if self.signature is not None:
            parts.append(self.signature.overload)
        if self.branch is not None:
            shapes = "_".join("x".join(map(str, shape)) for shape in self.branch)
            parts.append(f"branch_{shapes}" if self.op is FUSED else shapes)
        if self.norm_epsilon is not None:
            parts.append("norm" + self.norm_epsilon.hex().replace(".", "_").replace("+", ""))
        if self.activation != "none":
            parts.append(self.activation)
        if self.is_gated:
            parts.append("gate")
        if "addend" in self.inputs:
            parts.append("addend")
        if self.op is FUSED and self.signature is not None:
            parts.append(f"{self.num_outputs}x{self.signature.out_features}")
        return "_".join(parts)

    @property
    def parts(self) -> dict[str, "Form"]:
        """The linear and the branch alone, by the attribute of the node that names them."""
        if self.op is not FUSED or self.signature is None:
            return {}
        num_inputs = QLINEAR.num_required + self.signature.has_bias
        parts = {LINEAR_FUNCTION: Form(QLINEAR, self.signature, num_inputs)}
        if self.branch is not None:
            parts[BRANCH_FUNCTION] = Form(MONARCH, None, len(MONARCH.inputs), self.branch)
        return {name: replace(part, half=self.half) for name, part in parts.items()}


def read_form(node: ir.Node, *, half: bool) -> Form:
    """Return the form of a node.

    Args:
        node: A `treeq` node.
        half: Whether it stands in a float16 body.
    """
    op = next(op for op in OPS if op.name == node.op_type)
    given = [position for position, value in enumerate(node.inputs) if value is not None]
    names = ("R", "L") if op is MONARCH else ("branch_R", "branch_L")
    r, l_factor = (input_of(node, name) for name in names)
    has_norm = input_of(node, "norm_scale") is not None
    return Form(
        op=op,
        signature=None if op is MONARCH else read_signature(node),
        num_inputs=given[-1] + 1,
        branch=None if r is None else (static_shape(r), static_shape(l_factor)),
        norm_epsilon=node.attributes["norm_epsilon"].as_float() if has_norm else None,
        activation=activation_of(node),
        is_gated=input_of(node, "gate") is not None,
        num_outputs=len(node.outputs),
        half=half,
    )


def make_function(form: Form) -> ir.Function:
    """Return the function of one form; it has the op's inputs by name."""
    writer = BodyWriter()
    inputs = {name: ir.Value(name=name) for name in form.inputs}

    def read(name: str) -> ir.Value:
        as_is = name in _FULL or not form.half
        return inputs[name] if as_is else writer.op("Cast", inputs[name], to=FLOAT.value)

    y = _write(writer, form, read)
    if form.half:
        y = writer.op("Cast", y, to=HALF.value)
    outputs = [y] if form.num_outputs == 1 else writer.split(y, form.num_outputs)
    if form.op is FUSED:
        for index, value in enumerate(outputs, start=1):
            value.name = f"y{index}"
    graph = ir.Graph(
        list(inputs.values()), outputs, nodes=writer.tape.nodes, opset_imports={"": OPSET}
    )
    names = PLUGIN_ATTRIBUTES if form.half else ()
    declared = [ir.Attr(name, ir.AttributeType.STRING, None) for name in names]
    return ir.Function(DOMAIN, form.op.name, form.overload, graph=graph, attributes=declared)


def _write(writer: BodyWriter, form: Form, read: Callable[[str], ir.Value]) -> ir.Value:
    """Append all of a form and return y, float32."""
    x = read("x")
    if form.signature is None:
        assert form.branch is not None
        return write_monarch(writer, x, read("R"), read("L"), *form.branch)
    if form.norm_epsilon is not None:
        length = writer.constant([form.signature.in_features], np.int64)
        ones = writer.op("ConstantOfShape", length, value=ir.tensor(np.ones(1, np.float32)))
        norm = writer.op("LayerNormalization", x, ones, axis=-1, epsilon=form.norm_epsilon)
        scale = writer.op("Add", _row(writer, read("norm_scale")), writer.constant(1.0, np.float32))
        x = writer.op("Add", writer.op("Mul", norm, scale), _row(writer, read("norm_shift")))
    bias = read("bias") if form.signature.has_bias else None
    y = write_packed(writer, form.signature, x, read("planes"), read("weight_scale"), bias=bias)
    if form.branch is not None:
        branch = write_monarch(writer, x, read("branch_R"), read("branch_L"), *form.branch)
        y = writer.op("Add", y, branch)
    if "addend" in form.inputs:
        y = writer.op("Add", y, read("addend"))
    if form.activation == "gelu_tanh":
        y = writer.op("Gelu", y, approximate="tanh")
    if form.is_gated:
        y = writer.op("Mul", _row(writer, read("gate")), y)
        y = writer.op("Add", y, read("residual"))
    return y


def _row(writer: BodyWriter, value: ir.Value) -> ir.Value:
    """Append the Unsqueeze that lets a row an image meet all of its tokens."""
    return writer.op("Unsqueeze", value, writer.constant([1], np.int64))
