"""Quantized layers made by hand, with the reference's arithmetic."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from treeq_export.ops import LayerFormat
from treeq_export.quant import numerics
from treeq_export.quant.grids import INTEGER, find_grid, grid_attributes
from treeq_export.quant.packing import pack
from treeq_export.quant.rotation import rotate
from treeq_export.quant.spec import ActivationFormat
from treeq_export.targets.table import target_named


def lower(model: ir.Model, target: str) -> ir.Model:
    """Apply a target's passes to an exported graph, in place, and return it."""
    return target_named(target).lower(model)


SMALL: dict[str, Any] = {
    "weight_bits": 3,
    "act_bits": 4,
    "act_scale": "token_rms",
    "act_step": 0.3,
    "rotation_group": 8,
    "group_size": 0,
    "in_features": 64,
    "out_features": 5,
}


def make_format(**fields: Any) -> LayerFormat:
    """Return a layer's format; what is not given is that of a small layer."""
    return LayerFormat.from_attributes(SMALL | fields)


class HandLayer:
    """A quantized linear made by hand, with the reference's results for one input.

    Token 0 of `x` is zero and token 1 has one large value. `rank` is the number of axes of x.
    """

    def __init__(
        self,
        *,
        weight_bits: int = 4,
        act_bits: int | None = 4,
        act_scale: str = "token_rms",
        k: int = 64,
        n: int = 13,
        rotation_group: int = 32,
        group_size: int | None = None,
        bias: bool = True,
        rank: int = 3,
        name: str = "blocks.0.fc",
        seed: int = 0,
        grid: str = INTEGER.name,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.name, self.rotation_group, self.group_size = name, rotation_group, group_size
        self.weight_bits, self.rank = weight_bits, rank
        self.grid = find_grid(grid)
        self.activation = ActivationFormat.model_validate(
            {"bits": act_bits, "scale": act_scale, "grid": grid}
        )
        self.step = numerics.activation_step(self.activation)
        if self.activation.scale.is_static:
            self.step = float(np.float32(1.1 * self.grid.gaussian_step[act_bits or 0]))
        levels = self.grid.levels(weight_bits)
        self.codes = levels[rng.integers(0, len(levels), (n, k))]
        num_groups = k // group_size if group_size else 1
        self.weight_scale = rng.uniform(0.01, 0.03, (n, num_groups)).astype(np.float32)
        self.bias = rng.standard_normal(n).astype(np.float32) if bias else None
        x = np.random.default_rng(1).standard_normal((6, k)).astype(np.float32)
        x[0] = 0
        x[1, 3] = 40
        self.x = x if rank == 2 else x.reshape(2, 3, k)

    @property
    def format(self) -> LayerFormat:
        """What a kernel has to know of it."""
        return make_format(
            weight_bits=self.weight_bits,
            act_bits=self.activation.bits or 0,
            act_scale=self.activation.scale,
            act_step=self.step or 0.0,
            rotation_group=self.rotation_group,
            group_size=self.group_size or 0,
            in_features=self.codes.shape[1],
            out_features=len(self.codes),
        )

    @property
    def expected(self) -> NDArray[np.floating]:
        """The reference's y."""
        return numerics.qlinear(
            self.x,
            self.codes,
            self.weight_scale,
            activation=self.activation,
            step=self.step,
            rotation_group=self.rotation_group,
            bias=self.bias,
        )

    @property
    def expected_codes(self) -> NDArray[np.int8]:
        """The reference's activation codes (..., K)."""
        assert self.activation.bits is not None
        assert self.step is not None
        rotated = rotate(self.x, self.rotation_group)
        scale = numerics.activation_scale(rotated, self.activation.scale, self.step)
        return numerics.quantize_activation(rotated, scale, self.activation.bits, self.grid)

    @property
    def expected_sums(self) -> NDArray[np.int32]:
        """The reference's int32 sums (..., G, N)."""
        return numerics.accumulate(self.expected_codes, self.codes, self.weight_scale.shape[1])

    def make_node(self, x: ir.Value) -> tuple[ir.Node, list[ir.Value]]:
        """Return a `treeq::QLinear` node as the exporter writes it, and its initializers."""
        arrays = {
            "planes": pack(self.codes, self.weight_bits, self.grid),
            "weight_scale": self.weight_scale,
            "bias": self.bias,
        }
        values = [
            ir.val(f"model.{self.name}.{key}", const_value=ir.tensor(array))
            for key, array in arrays.items()
            if array is not None
        ]
        node = ir.node(
            "QLinear",
            [x, *values],
            attributes=self.format.attributes() | grid_attributes(self.grid.name, self.grid.name),
            domain="treeq",
            version=1,
        )
        y = node.outputs[0]
        assert x.shape is not None
        y.name, y.type = f"{self.name}/y", ir.TensorType(ir.DataType.FLOAT)
        y.shape = ir.Shape([*x.shape[:-1], len(self.codes)])
        return node, values


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., HandLayer]:
    """A function: options of `HandLayer` -> a quantized linear made by hand."""
    return HandLayer


@pytest.fixture(scope="session")
def make_model() -> Callable[..., ir.Model]:
    """A function: hand-made layers -> a model of `treeq::QLinear` nodes that all read "x"."""

    def make(*layers: HandLayer) -> ir.Model:
        x = ir.val("x", ir.DataType.FLOAT, ["batch", *layers[0].x.shape[1:]])
        made = [layer.make_node(x) for layer in layers]
        graph = ir.Graph(
            [x],
            [node.outputs[0] for node, _ in made],
            nodes=[node for node, _ in made],
            initializers=[value for _, values in made for value in values],
            opset_imports={"": 21, "treeq": 1},
            name="hand",
        )
        return ir.Model(graph, ir_version=10)

    return make
