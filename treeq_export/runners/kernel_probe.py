"""One layer of the `ort` target in our kernels, fed with the reference's input.

The output comes from ONNX Runtime, which runs the layer's node with the custom-op library. The
codes and the int32 sums, which no node gives out, come from the same kernels through their C ABI,
made from the same initializers.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from treeq_export.errors import RunnerError
from treeq_export.ops import ActScale, LayerFormat
from treeq_export.runners.cpu_kernels import CpuQLinear
from treeq_export.runners.graph_meta import LayerSite
from treeq_export.runners.ort_runner import OrtRunner
from treeq_export.runners.plain_layer import (
    INPUT,
    cut_packed,
    find_packed_node,
    input_of,
    own_channels,
    read_format,
)


class KernelProbe:
    """Runs one layer of a compiled graph alone, in our kernels.

    Args:
        model: The compiled graph.
        site: The layer's place in it.

    Raises:
        RunnerError: The graph has no such node.
    """

    def __init__(self, model: ir.Model, site: LayerSite) -> None:
        self.name, self._site = site.name, site
        node = find_packed_node(model, site)
        if node is None:
            raise RunnerError(f"{site.name}: no treeq node in the graph. Compile again.")
        self._node = node
        self._model = cut_packed(model, node, as_functions=False)

    def run_output(self, x: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Return y (..., N) and the codes (..., K) int8, None for weight-only layers.

        Args:
            x: (..., K), the layer's input.
        """
        serialized = ir.to_proto(self._model).SerializeToString()
        with OrtRunner(serialized, threads=1) as runner:
            y = own_channels(self._site, runner.run({INPUT: x}))
        return y, None if self._is_weight_only() else self._inspect(x)[0].reshape(x.shape)

    def run_accumulators(self, x: NDArray[np.float32]) -> NDArray[Any] | None:
        """Return q_x q_w^T as (..., G, N) int32, None for weight-only layers.

        Args:
            x: (..., K), the layer's input.
        """
        if self._is_weight_only():
            return None
        sums = own_channels(self._site, self._inspect(x)[1])
        return sums.reshape(*x.shape[:-1], *sums.shape[1:])

    def run_products(self, codes: NDArray[np.int8]) -> NDArray[np.int32]:
        """Return q_x q_w^T of given codes as (M, G, N).

        With the static step 1 and without a rotation an x is its own codes.

        Args:
            codes: (M, K), one row a token.
        """
        plain = replace(
            read_format(self._node),
            act_scale=ActScale.TENSOR_STATIC,
            act_step=1.0,
            rotation_group=1,
        )
        with self._open(plain) as layer:
            return own_channels(self._site, layer.inspect(codes.astype(np.float32))[2])

    def _is_weight_only(self) -> bool:
        return not read_format(self._node).act_bits

    def _inspect(self, x: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.int32]]:
        with self._open(read_format(self._node)) as layer:
            codes, _, sums = layer.inspect(x.reshape(-1, x.shape[-1]))
        return codes, sums

    def _open(self, layer_format: LayerFormat) -> CpuQLinear:
        arrays = (_initializer(self._node, name) for name in ("planes", "weight_scale"))
        return CpuQLinear(layer_format, *arrays, name=self.name)


def _initializer(node: ir.Node, name: str) -> NDArray[Any]:
    value = input_of(node, name)
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()
