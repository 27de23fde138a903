"""One hand-made graph for each pattern that TensorRT refuses late or builds wrong."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from tests.hand_layers import lower
from treeq_export.compile.passes.check_patterns import CheckPatterns
from treeq_export.errors import CompileError
from treeq_export.targets.names import ENGINES, TENSORRT, TENSORRT_NATIVE
from treeq_export.targets.table import target_named

Make = Callable[..., Any]
K, N = 64, 8
FLOAT, HALF, INT8 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8


class Hand:
    """A graph with the input x (batch, K), written node by node under the name of one layer."""

    def __init__(self, dtype: ir.DataType = FLOAT) -> None:
        self.x = ir.val("x", dtype, ["batch", K])
        self.graph = ir.Graph([self.x], [], nodes=[], opset_imports={"": 21}, name="g")

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        name = f"blocks.0.fc/{op_type}_{len(self.graph)}"
        node = ir.node(op_type, inputs, attributes=attributes, name=name)
        node.outputs[0].name = f"{name}/y"
        self.graph.append(node)
        return node.outputs[0]

    def store(self, array: Any) -> ir.Value:
        name = f"w{len(self.graph.initializers)}"
        value = ir.val(name, const_value=ir.tensor(np.asarray(array), name=name))
        self.graph.register_initializer(value)
        return value

    def weight(self, dtype: Any = np.int8) -> ir.Value:
        return self.store(np.ones((K, N)).astype(dtype))

    def activation(self, scale_type: Any = np.float32) -> ir.Value:
        unit, zero = self.store(np.asarray(1, scale_type)), self.store(np.int8(0))
        codes = self.op("QuantizeLinear", self.x, unit, zero)
        return self.op("DequantizeLinear", codes, unit, zero)

    def dequantized(self, scale_type: Any = np.float32) -> ir.Value:
        return self.op(
            "DequantizeLinear", self.weight(), self.store(np.ones(N, scale_type)), axis=1
        )

    def refusal(self, *outputs: ir.Value) -> str:
        self.graph.outputs.extend(outputs)
        with pytest.raises(CompileError) as caught:
            CheckPatterns()(ir.Model(self.graph, ir_version=10))
        message = str(caught.value)
        assert "\n" not in message
        return message

    def accept(self, *outputs: ir.Value) -> None:
        self.graph.outputs.extend(outputs)
        assert not CheckPatterns()(ir.Model(self.graph, ir_version=10)).modified


@pytest.fixture
def hand() -> Hand:
    return Hand()


def test_the_form_of_lower_native_is_accepted(hand: Hand):
    product = hand.op("MatMul", hand.activation(), hand.dequantized())
    scaled = hand.op("Mul", product, hand.store(np.float32(2)))
    hand.accept(hand.op("Cast", scaled, to=HALF.value))


def test_block_scaled_weight_with_int8_activation(hand: Hand):
    scale = hand.store(np.ones((K // 16, N), np.float32))
    weight = hand.op("DequantizeLinear", hand.weight(), scale, axis=0, block_size=16)
    product = hand.op("MatMul", hand.activation(), weight)
    message = hand.refusal(hand.op("Mul", product, hand.store(np.float32(2))))
    assert message.startswith("blocks.0.fc: TensorRT builds a wrong engine from block-scaled")
    assert "search.exclude" in message


@pytest.mark.parametrize("where", ["activation scale", "weight scale", "product", "multiply"])
def test_float16_around_an_int8_gemm(where: str):
    hand = Hand(HALF if where == "activation scale" else FLOAT)
    activation = hand.activation(np.float16 if where == "activation scale" else np.float32)
    weight = hand.dequantized(np.float16 if where == "weight scale" else np.float32)
    product = hand.op("MatMul", activation, weight)
    if where == "product":  # narrowed before it is scaled: the int32 sum in float16
        product = hand.op("Cast", product, to=HALF.value)
    scale = hand.store(np.asarray(2, np.float16 if where in ("product", "multiply") else "f"))
    if where == "activation scale":
        scale = hand.op("Cast", scale, to=HALF.value)
    message = hand.refusal(hand.op("Mul", product, scale))
    if where == "multiply":
        assert "blocks.0.fc: Mul of FLOAT and FLOAT16; TensorRT's networks" in message
    else:
        assert "blocks.0.fc: float16 around an Int8 gemm" in message


def test_lowering_of_half_scales_is_refused(make_layer: Make, make_model: Make):
    """The whole list of passes, with the scales turned to float16 by hand before the check."""
    model = make_model(make_layer())
    for rewrite in target_named(TENSORRT_NATIVE).passes[:-1]:
        rewrite(model)
    scale = model.graph.initializers["blocks.0.fc.weight_quantized_scale"]
    scale.const_value = ir.tensor(scale.const_value.numpy().astype(np.float16), name=scale.name)
    scale.dtype = HALF
    with pytest.raises(CompileError, match=r"^blocks\.0\.fc: .*float16 around an Int8 gemm"):
        CheckPatterns()(model)


@pytest.mark.parametrize("dtype", ["UINT4", "INT2", "UINT2", "FLOAT8E5M2"])
def test_types_that_tensorrt_lacks(dtype: str, hand: Hand):
    weight = hand.weight(getattr(ml_dtypes, dtype.lower().replace("8e5m2", "8_e5m2")))
    assert weight.dtype is not None
    assert weight.dtype.name == dtype
    dequantized = hand.op("DequantizeLinear", weight, hand.store(np.ones(N, np.float32)), axis=1)
    message = hand.refusal(hand.op("MatMul", hand.x, dequantized))
    assert f"{weight.name}: TensorRT has no type {dtype}." in message


@pytest.mark.parametrize("op_type", ["QuantizeLinear", "DequantizeLinear"])
def test_zero_points(op_type: str, hand: Hand):
    unit = hand.store(np.float32(1))
    zero, three = hand.store(np.int8(0)), hand.store(np.int8(3))
    points = (three, zero) if op_type == "QuantizeLinear" else (zero, three)
    codes = hand.op("QuantizeLinear", hand.x, unit, points[0])
    message = hand.refusal(hand.op("DequantizeLinear", codes, unit, points[1]))
    assert message.startswith("blocks.0.fc: TensorRT refuses zero points other than 0.")


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, np.int8])
@pytest.mark.parametrize("op_type", ["Cast", "Transpose"])
def test_stored_codes_feed_dequantizers_only(op_type: str, dtype: Any, hand: Hand):
    weight = hand.weight(dtype)
    more = {"to": FLOAT.value} if op_type == "Cast" else {"perm": [1, 0]}
    read = hand.op(op_type, weight, **more)
    scale = hand.store(np.ones(N, np.float32))
    also = hand.op("DequantizeLinear", weight, scale, axis=1)
    message = hand.refusal(read, also)
    name = "INT4" if dtype is ml_dtypes.int4 else "INT8"
    assert message.startswith(f"blocks.0.fc: TensorRT refuses a stored {name} that feeds {op_type}")


@pytest.mark.parametrize("op_type", ["DynamicQuantizeLinear", "MatMulInteger"])
def test_operators_that_tensorrt_lacks(op_type: str, hand: Hand):
    codes = hand.op("Cast", hand.x, to=INT8.value)
    inputs = (hand.x,) if op_type == "DynamicQuantizeLinear" else (codes, codes)
    message = hand.refusal(hand.op(op_type, *inputs))
    assert message.startswith(f"blocks.0.fc: TensorRT refuses {op_type}.")


@pytest.mark.parametrize("block", [8, K, 256])
def test_blocks_out_of_range_or_of_the_whole_axis(block: int, hand: Hand):
    scale = hand.store(np.ones((max(1, K // block), N), np.float32))
    weight = hand.op("DequantizeLinear", hand.weight(), scale, axis=0, block_size=block)
    message = hand.refusal(hand.op("MatMul", hand.x, weight))
    assert f"block_size {block} is none of those known to work, 16..128" in message


def test_scales_computed_at_run_time(hand: Hand):
    """One scale per token as a 1-D scale: TensorRT computes with Half."""
    scale = hand.op("ReduceMax", hand.op("Abs", hand.x), hand.store(np.array([1])), keepdims=0)
    zero = hand.store(np.int8(0))
    codes = hand.op("QuantizeLinear", hand.x, scale, zero, axis=0)
    message = hand.refusal(hand.op("DequantizeLinear", codes, scale, zero, axis=0))
    assert message.startswith("blocks.0.fc: TensorRT computes with Half where a scale of Q/DQ")


def test_mixed_types(hand: Hand):
    half = hand.op("Cast", hand.x, to=HALF.value)
    message = hand.refusal(hand.op("Add", half, hand.x))
    assert message.startswith("blocks.0.fc: Add of FLOAT and FLOAT16; TensorRT's networks are")


def test_weight_only_is_accepted():
    hand = Hand(HALF)
    scale = hand.store(np.ones((K // 16, N), np.float16))
    weight = hand.op("DequantizeLinear", hand.weight(ml_dtypes.int4), scale, axis=0, block_size=16)
    hand.accept(hand.op("MatMul", hand.x, weight))


@pytest.mark.parametrize("target", ENGINES)
def test_both_targets_end_in_the_check(target: str):
    """Function bodies, which TensorRT does not read, come after it."""
    names = [type(rewrite).__name__ for rewrite in target_named(target).passes]
    behind = names[names.index("CheckPatterns") + 1 :]
    assert behind == (["AddFunctionBodies"] if target == TENSORRT else [])


def test_portable_graphs_would_be_refused(make_layer: Make, make_model: Make):
    """The `portable` form of the same layer: INT4 into a Cast, groups as MatMulInteger."""
    for options, problem in (({}, "stored INT4 that feeds Cast"), ({"group_size": 32}, "Integer")):
        model = lower(make_model(make_layer(**options)), "portable")
        with pytest.raises(CompileError, match=problem):
            CheckPatterns()(model)
