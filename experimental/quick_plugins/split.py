"""Pass `SplitQuickPlugins`: `treeq::QLinear` of a compiled graph as the two quick plugins.

Untested in TensorRT: it needs TensorRT >= 10.8 and a GPU. What is tested is the graph.

Rules, on the finished graph of target `tensorrt`:
1. A layer becomes QuantizeTokens(x) -> QProduct, which keeps its name and its output. They have the
   inputs and attributes that plugin.py registers.
2. Layers that read one value in one activation format (q, k and v) share a QuantizeTokens.
3. A missing bias is the weight scale, a missing addend is x; has_bias and has_addend say so.
4. Monarch branches become standard operators (LowerMonarch).
"""

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass
from treeq_gpu import choose

from experimental.quick_plugins.plugin import CODES_PER_WORD, PRODUCT_OP, QUANTIZE_OP, QuickOp
from treeq_export.artefacts import atomic_path
from treeq_export.compile.graph.rewrite import replace_node
from treeq_export.compile.graph.signature import DOMAIN, QLINEAR, nodes_of
from treeq_export.compile.passes.check_patterns import CheckPatterns
from treeq_export.compile.passes.lower_monarch import LowerMonarch
from treeq_export.errors import CompileError
from treeq_export.ops import PLUGIN_ATTRIBUTES
from treeq_export.runners.graph_file import read_graph
from treeq_export.runners.plain_layer import input_of

QUICK_FILE = "model.quick.onnx"
Shared = dict[tuple[object, ...], ir.Node]


class SplitQuickPlugins(InPlacePass):
    """Split the layers; ensures that no QLinear is left."""

    def call(self, model: ir.Model) -> PassResult:
        """Change the graph in place."""
        nodes = nodes_of(model, QLINEAR)
        shared: Shared = {}
        for node in nodes:
            _split(model.graph, node, shared)
        return PassResult(model, bool(nodes))


PASSES: tuple[InPlacePass, ...] = (
    LowerMonarch(),
    SplitQuickPlugins(),
    RemoveUnusedNodesPass(),
    RemoveUnusedFunctionsPass(),
    CheckPatterns(),
)


def split_file(path: Path) -> Path:
    """Write the graph for quick plugins beside a compiled one, with which it shares external data.

    Args:
        path: The model file of target `tensorrt`.

    Returns:
        The new model file.
    """
    model = read_graph(path, error=CompileError, remedy="Run `treeq-export compile` again.")
    for rewrite in PASSES:
        rewrite(model)
    quick = path.with_name(QUICK_FILE)
    with atomic_path(quick) as temporary:
        ir.save(model, temporary)
    return quick


def _split(graph: ir.Graph, node: ir.Node, shared: Shared) -> None:
    x, planes, weight_scale = (input_of(node, name) for name in ("x", "planes", "weight_scale"))
    bias, addend = input_of(node, "bias"), input_of(node, "addend")
    key = (x, *(node.attributes[name].value for name in QUANTIZE_OP.attributes))
    if key not in shared:
        shared[key] = _quantize_tokens(node)
        graph.insert_before(node, shared[key])
    codes, act_scale = shared[key].outputs
    flags = {"has_bias": int(bias is not None), "has_addend": int(addend is not None)}
    product = _make_node(
        PRODUCT_OP,
        [codes, planes, act_scale, weight_scale, bias or weight_scale, addend or x],
        node,
        flags,
        node.name,
    )
    replace_node(graph, node.outputs[0], [product])


def _quantize_tokens(node: ir.Node) -> ir.Node:
    x, name = input_of(node, "x"), f"{node.name}/codes"
    made = _make_node(QUANTIZE_OP, [x], node, {}, name)
    codes, scale = made.outputs
    codes.name, scale.name = f"{name}:0", f"{name}:1"
    codes.type, scale.type = ir.TensorType(ir.DataType.INT32), ir.TensorType(ir.DataType.FLOAT)
    if x is not None and x.shape is not None:
        words = choose.padded(node.attributes["in_features"].as_int()) // CODES_PER_WORD
        tokens = list(x.shape)[:-1]
        codes.shape, scale.shape = ir.Shape([*tokens, words]), ir.Shape(tokens)
    return made


def _make_node(
    op: QuickOp,
    inputs: list[ir.Value | None],
    layer: ir.Node,
    flags: dict[str, int],
    name: str | None,
) -> ir.Node:
    """Return a node of a quick plugin with the layer's attributes that the plugin has."""
    attributes = {n: flags[n] if n in flags else layer.attributes[n].value for n in op.attributes}
    return ir.node(
        op.name.rpartition("::")[2],
        inputs,
        attributes=attributes | PLUGIN_ATTRIBUTES,
        domain=DOMAIN,
        version=1,
        num_outputs=op.num_outputs,
        name=name,
    )
