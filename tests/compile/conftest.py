"""Fixtures of the compile tests: Monarch branches made by hand, ONNX Runtime in one call."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from treeq_export.plan import (
    FORMAT_VERSION,
    LayerPlan,
    ModelRecord,
    Plan,
    StrategyRecord,
    Tensors,
    TreePath,
)
from treeq_export.quant.spec import BranchFormat, WeightFormat
from treeq_served.ort_session import open_session


class HandBranch:
    """A `treeq::Monarch` with random factors beside the layer of that name."""

    def __init__(self, b_in: int, b_out: int, rank: int, k: int, n: int, name: str) -> None:
        rng = np.random.default_rng(7)
        self.format = BranchFormat(b_in=b_in, b_out=b_out, rank=rank)
        self.name, self.n = name, n
        self.R = rng.standard_normal((b_in, k // b_in, b_out * rank)).astype(np.float32)
        self.L = rng.standard_normal((b_out, b_in * rank, n // b_out)).astype(np.float32)

    def make_node(self, x: ir.Value) -> tuple[ir.Node, list[ir.Value]]:
        """Return the node as the exporter writes it, and its initializers."""
        values = [
            ir.val(f"model.{self.name}.branch.{key}", const_value=ir.tensor(array))
            for key, array in (("R", self.R), ("L", self.L))
        ]
        node = ir.node("Monarch", [x, *values], domain="treeq", version=1)
        y = node.outputs[0]
        assert x.shape is not None
        y.name, y.type = f"{self.name}/branch_y", ir.TensorType(ir.DataType.FLOAT)
        y.shape = ir.Shape([*x.shape[:-1], self.n])
        return node, values


@pytest.fixture(scope="session")
def make_branch() -> Callable[..., HandBranch]:
    """A function: grid, rank, K, N and name -> a Monarch branch made by hand."""

    def make(
        b_in: int = 1,
        b_out: int = 1,
        rank: int = 3,
        k: int = 64,
        n: int = 12,
        name: str = "blocks.0.fc",
    ) -> HandBranch:
        return HandBranch(b_in, b_out, rank, k, n, name)

    return make


@pytest.fixture(scope="session")
def make_sum_model() -> Callable[..., ir.Model]:
    """A function: a hand-made layer, branches and the rank of x -> a model of their sums.

    The layer's y is followed by one Add per branch, in order; the last sum is the output. Without
    a layer, the output is that of the first branch.
    """

    def make(layer: Any, *branches: HandBranch, rank: int = 3) -> ir.Model:
        k = branches[0].R.shape[0] * branches[0].R.shape[1]
        x = ir.val("x", ir.DataType.FLOAT, ["batch", *([3] if rank == 3 else []), k])
        made = [part.make_node(x) for part in (layer, *branches) if part is not None]
        nodes = [node for node, _ in made]
        total = nodes[0].outputs[0]
        for branch in nodes[1:]:
            add = ir.node("Add", [total, branch.outputs[0]])
            add.outputs[0].type, add.outputs[0].shape = total.type, total.shape
            add.outputs[0].name = "sum" if total is nodes[0].outputs[0] else f"{total.name}_more"
            nodes.append(add)
            total = add.outputs[0]
        graph = ir.Graph(
            [x],
            [total],
            nodes=nodes,
            initializers=[value for _, values in made for value in values],
            opset_imports={"": 21, "treeq": 1},
            name="hand",
        )
        return ir.Model(graph, ir_version=10)

    return make


@pytest.fixture(scope="session")
def run_onnx() -> Callable[[ir.Model, NDArray[Any]], NDArray[Any]]:
    """A function: a model with the input "x" and an array -> its first output.

    The model has to pass onnx.checker and to run in ONNX Runtime without any library of ours, with
    the options of our sessions.
    """

    def run(model: ir.Model, x: NDArray[Any]) -> NDArray[Any]:
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        session = open_session(proto.SerializeToString(), None)
        return np.asarray(session.run(None, {"x": x})[0])

    return run


@pytest.fixture(scope="session")
def exported_dit(compiled_dit: Any) -> ir.Model:
    """The exported tiny DiT, before any pass. Read-only: clone it."""
    return compiled_dit.export()


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., tuple[Plan, Tensors]]:
    """A function: hand-made layers -> their plan, codes and scales."""

    def make(*layers: Any) -> tuple[Plan, Tensors]:
        entries = tuple(
            LayerPlan(
                name=layer.name,
                in_features=layer.codes.shape[1],
                out_features=layer.codes.shape[0],
                tree=TreePath(block=0, position=layer.name, leaf=0),
                weight=WeightFormat(bits=layer.weight_bits, group_size=layer.group_size),
                activation=layer.activation,
                rotation_group=layer.rotation_group,
            )
            for layer in layers
        )
        plan = Plan(
            format_version=FORMAT_VERSION,
            model=ModelRecord(name="hand", class_name="Hand", num_parameters=0),
            checkpoint_sha256="0" * 64,
            strategy=StrategyRecord(name="uniform", options={}),
            layers=entries,
        )
        tensors = {f"{layer.name}.codes": layer.codes for layer in layers}
        return plan, tensors | {
            f"{layer.name}.weight_scale": layer.weight_scale for layer in layers
        }

    return make
