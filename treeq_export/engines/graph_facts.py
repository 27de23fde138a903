"""What a build needs to know of a compiled graph: profile, plugins, and whose product is where.

The engine's layer list names ONNX nodes. Of each planned layer the node of its matrix product is

1. the `treeq::QLinear` node that the metadata's layer list gives it, or
2. every MatMul or Gemm that the constant `<layer>.weight_quantized` reaches through nodes that only
   change its scale, type or shape.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from treeq_export.errors import CompileError
from treeq_export.ops import DOMAIN, MONARCH, PLUGIN_VERSION, PLUGINS, QLINEAR
from treeq_export.records.build import PluginReference, ShapeRange
from treeq_export.runners.graph_file import read_graph
from treeq_export.runners.graph_meta import PLAN_KEY, read_layers, read_profile

WEIGHT_SUFFIX = ".weight_quantized"
_BRANCH_SUFFIX = "/branch"
_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "Einsum"})
_PASSES_ON = frozenset({"DequantizeLinear", "Cast", "Reshape", "Transpose", "Mul", "Unsqueeze"})


@dataclass(frozen=True)
class GraphFacts:
    """Facts of one compiled graph.

    Attributes:
        products: Names of the nodes of its matrix product, by quantized layer.
        branches: Names of the Monarch plugin nodes, with their layer.
        all_products: Names of every node that is a product or one of our products' plugins.
        profile: Shapes by input.
        plan_sha256: Digest of the plan; "" where the metadata has none.
        plugins: Plugins of a library that its nodes ask for.
    """

    products: dict[str, frozenset[str]]
    branches: dict[str, str]
    all_products: frozenset[str]
    profile: dict[str, ShapeRange]
    plan_sha256: str
    plugins: tuple[PluginReference, ...]


def read_facts(path: Path, max_batch: int, opt_batch: int = 2) -> GraphFacts:
    """Read a compiled graph.

    Args:
        path: The model file.
        max_batch: Largest batch, for graphs whose metadata has no profile.
        opt_batch: Batch to tune for, for graphs whose metadata has no profile.

    Raises:
        CompileError: The file is damaged, or an input's shape is not known.
        PlanError: The metadata are malformed.
    """
    model = read_graph(path, error=CompileError, remedy="Run `treeq-export compile` again.")
    graph = model.graph
    named = {op.name: _names(graph, DOMAIN, {op.name}) for op in PLUGINS}
    packed, branches = named[QLINEAR.name], named[MONARCH.name]
    products: dict[str, frozenset[str]] = {}
    for site in read_layers(model):
        node, weight = site.node or site.name, graph.initializers.get(site.name + WEIGHT_SUFFIX)
        if node in packed:
            products[site.name] = frozenset({node})
        else:
            products[site.name] = frozenset(() if weight is None else _products_of(weight))
    return GraphFacts(
        products=products,
        branches={name: name.removesuffix(_BRANCH_SUFFIX) for name in branches},
        all_products=packed | branches | _names(graph, "", _PRODUCTS),
        profile=_read_profile(path, model, opt_batch, max_batch),
        plan_sha256=model.metadata_props.get(PLAN_KEY, ""),
        plugins=tuple(
            PluginReference(name=name, version=PLUGIN_VERSION, namespace=DOMAIN)
            for name in sorted(named)
            if named[name]
        ),
    )


def _names(graph: ir.Graph, domain: str, op_types: Collection[str]) -> frozenset[str]:
    """Return the names of the nodes of some operators."""
    nodes = (n for n in graph if n.domain == domain and n.op_type in op_types)
    return frozenset(node.name or "" for node in nodes)


def _products_of(value: ir.Value) -> Iterator[str]:
    """Yield the names of the products that a weight reaches."""
    for use in value.uses():
        if use.node.op_type in _PRODUCTS:
            yield use.node.name or ""
        elif use.node.op_type in _PASSES_ON:
            yield from _products_of(use.node.outputs[0])


def _read_profile(
    path: Path, model: ir.Model, opt_batch: int, max_batch: int
) -> dict[str, ShapeRange]:
    """Return the metadata's profile, or the batch put in for the dynamic axes."""
    profile = read_profile(model)
    if profile is not None:
        return profile
    profile = {}
    for value in model.graph.inputs:
        if value.shape is None or value.name is None:
            raise CompileError(
                f"{path}: input {value.name} has no shape. Run `treeq-export compile` again."
            )
        shapes = {
            key: [dim if isinstance(dim, int) else batch for dim in value.shape]
            for key, batch in (("min", 1), ("opt", min(opt_batch, max_batch)), ("max", max_batch))
        }
        profile[value.name] = ShapeRange(**shapes)
    return profile
