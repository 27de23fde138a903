"""One layer cut out of a compiled graph, so that it can be fed the reference's input.

The cut graph holds the very nodes of the target, function bodies inlined. Three probes:

    output probe        x -> y, and the activation codes (the QuantizeLinear's output)
    accumulator probe   x -> (q_x q_w^T), the same matrix product with all weight scales set to 1
    product probe       q_x -> (q_x q_w^T), for codes that no x of the model may bring about

The last two run the same fused integer operator as the model. Its float32 output equals the int32
sum wherever that is below 2^24, and its float32 rounding above.

A layer in a float16 body takes x in float16; its y is given back as float32. A plugin node of the
`tensorrt` target is run as its function body.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass

from treeq_export.errors import RunnerError
from treeq_export.ops import PLUGIN_ATTRIBUTES
from treeq_export.runners.graph_meta import LayerSite
from treeq_export.runners.ort_runner import OrtRunner
from treeq_export.runners.plain_layer import (
    INPUT,
    OUTPUT,
    cut_lowered,
    cut_packed,
    find_packed_node,
    own_channels,
)

_CODES = "probe_codes"
_SUMS = "probe_sums"


class LayerProbe:
    """Runs one layer of a compiled graph alone.

    Args:
        model: The compiled graph.
        site: The layer's place in it.
        keep_int8: Whether INT8 activations of Q/DQ stay INT8, see `open_session`.
    """

    def __init__(self, model: ir.Model, site: LayerSite, *, keep_int8: bool = False) -> None:
        self.name, self._site = site.name, site
        self._model = model
        self._keep_int8 = keep_int8

    def run_output(self, x: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Return y (..., N) and the codes (..., K) int8, None for weight-only layers.

        Args:
            x: (..., K), the layer's input.
        """
        model = self._cut()
        quantize = _find(model, "QuantizeLinear")
        if quantize is not None:
            _add_codes(model, quantize)
        results = self._run(model, x)
        y = results[OUTPUT].astype(np.float32)
        codes = None if quantize is None else _without_zero_point(quantize, results[_CODES])
        return own_channels(self._site, y), codes

    def run_accumulators(self, x: NDArray[np.float32]) -> NDArray[Any] | None:
        """Return q_x q_w^T as (..., G, N), None for weight-only layers.

        Args:
            x: (..., K), the layer's input.
        """
        model = self._cut()
        if _find(model, "QuantizeLinear") is None:
            return None
        _reduce_to_sums(model, self.name)
        return self._run_sums(model, x)

    def run_products(self, codes: NDArray[np.int8]) -> NDArray[Any]:
        """Return q_x q_w^T of given codes as (M, G, N).

        Args:
            codes: (M, K), one row a token.

        Raises:
            RunnerError: The layer's activations are not quantized.
        """
        model = self.cut_products()
        shape = model.graph.inputs[0].shape
        assert shape is not None
        lead = (1,) * (len(shape) - 2)
        sums = self._run_sums(model, codes.reshape(*lead, *codes.shape).astype(np.float32))
        return sums.reshape(len(codes), *sums.shape[-2:])

    def cut_products(self) -> ir.Model:
        """Return the layer from its codes as float32 (..., K) to its sums.

        Returns:
            A model whose output is float32 (..., N), or int32 with the groups before the rows.

        Raises:
            RunnerError: The layer's activations are not quantized.
        """
        model = self._cut()
        quantize = _find(model, "QuantizeLinear")
        if quantize is None:
            raise RunnerError(f"{self.name}: has no activation codes.")
        shape = model.graph.inputs[0].shape
        assert shape is not None
        free = ir.Shape([*[None] * (len(shape) - 1), shape[-1]])
        x = ir.Value(name=INPUT, shape=free, type=ir.TensorType(ir.DataType.FLOAT))
        quantize.replace_input_with(0, x)
        model.graph.inputs[:] = [x]
        _reduce_to_sums(model, self.name)
        return model

    def _run_sums(self, model: ir.Model, x: NDArray[np.float32]) -> NDArray[Any]:
        grouped = _find(model, "MatMulInteger") is not None
        sums = self._run(model, x)[_SUMS]
        sums = np.swapaxes(sums, -3, -2) if grouped else sums[..., None, :]
        return own_channels(self._site, sums)

    def _run(self, model: ir.Model, x: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        source = model.graph.inputs[0]
        assert source.name is not None
        serialized = ir.to_proto(model).SerializeToString()
        with OrtRunner(serialized, threads=1, keep_int8=self._keep_int8) as runner:
            half = source.dtype == ir.DataType.FLOAT16
            return runner.run_all({source.name: x.astype(np.float16) if half else x})

    def _cut(self) -> ir.Model:
        node = find_packed_node(self._model, self._site)
        if node is None or PLUGIN_ATTRIBUTES.keys() <= node.attributes.keys():
            # Where the branch is an input of the node, both values of the site are in the graph.
            model = cut_lowered(self._model, self._site)
        else:
            model = cut_packed(self._model, node, as_functions=True)
        InlinePass()(model)
        return model


def _find(model: ir.Model, op_type: str) -> ir.Node | None:
    return next((node for node in model.graph if node.op_type == op_type), None)


def _without_zero_point(quantize: ir.Node, codes: NDArray[Any]) -> NDArray[np.int8]:
    """Return what a QuantizeLinear gave as codes around 0."""
    return (codes.astype(np.int16) - _zero_point(quantize).numpy()).astype(np.int8)


def _zero_point(quantize: ir.Node) -> ir.TensorProtocol:
    """Return a QuantizeLinear's zero point, which bodies/qlinear.py writes as a Constant."""
    value = quantize.inputs[2]
    producer = None if value is None else value.producer()
    assert producer is not None
    return producer.attributes["value"].as_tensor()


def _reduce_to_sums(model: ir.Model, name: str) -> None:
    """Let a cut layer give out its sums alone."""
    grouped = _find(model, "MatMulInteger")
    if grouped is not None:
        _set_only_output(model, grouped.outputs[0])
        return
    product = _find_product(model, name)
    _set_weight_scale_to_one(model, product)
    _set_only_output(model, product.outputs[0])


def _find_product(model: ir.Model, name: str) -> ir.Node:
    """Return the MatMul both of whose operands are dequantized."""
    for node in model.graph:
        producers = [None if value is None else value.producer() for value in node.inputs]
        if node.op_type == "MatMul" and all(
            producer is not None and producer.op_type == "DequantizeLinear"
            for producer in producers
        ):
            return node
    raise RunnerError(f"{name}: no matrix product of dequantized operands. Compile again.")


def _set_weight_scale_to_one(model: ir.Model, product: ir.Node) -> None:
    """Give the weight's DequantizeLinear a scale of ones."""
    weight, output = product.inputs[1], model.graph.outputs[0]
    dequantize = None if weight is None else weight.producer()
    assert dequantize is not None
    assert output.shape is not None
    out_features = output.shape[-1]
    assert isinstance(out_features, int)
    tensor = ir.tensor(np.ones(out_features, np.float32), name="probe_ones")
    ones = ir.val("probe_ones", const_value=tensor)
    model.graph.register_initializer(ones)
    dequantize.replace_input_with(1, ones)


def _add_codes(model: ir.Model, quantize: ir.Node) -> None:
    """Make a QuantizeLinear's output a graph output."""
    value = quantize.outputs[0]
    value.name, value.type = _CODES, ir.TensorType(_zero_point(quantize).dtype)
    model.graph.outputs.append(value)


def _set_only_output(model: ir.Model, value: ir.Value) -> None:
    """Make a value the only graph output."""
    model.graph.outputs.clear()
    value.name = _SUMS
    producer = value.producer()
    grouped = producer is not None and producer.op_type == "MatMulInteger"
    value.type = ir.TensorType(ir.DataType.INT32 if grouped else ir.DataType.FLOAT)
    model.graph.outputs.append(value)
    RemoveUnusedNodesPass()(model)
