from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest

from treeq_export import __version__
from treeq_export.compile.audits.onnx_runtime import check_metadata
from treeq_export.compile.passes.clean_metadata import CleanMetadata
from treeq_export.errors import CompileError

Make = Callable[..., Any]
LOCAL = "/home/somebody/site-packages/torch/nn/linear.py"


@pytest.fixture
def littered(make_layer: Make, make_model: Make) -> ir.Model:
    """A model in which every holder of metadata and every doc string names a local path."""
    model = make_model(make_layer())
    inner = ir.Value(name="inner")
    body = ir.node("Relu", [inner])
    function = ir.Function(
        "local",
        "F",
        "",
        graph=ir.Graph([inner], body.outputs, nodes=[body], opset_imports={"": 21}),
        attributes=[],
    )
    model.functions[function.identifier()] = function
    holders = [
        model,
        model.graph,
        *model.graph.inputs,
        *model.graph.initializers.values(),
        *model.graph,
        *model.graph.outputs,
        function,
        inner,
        body,
        *body.outputs,
    ]
    for holder in holders:
        holder.metadata_props["stack_trace"] = LOCAL
        holder.doc_string = LOCAL
    return model


def test_no_path_is_left(littered: ir.Model):
    assert LOCAL.encode() in ir.to_proto(littered).SerializeToString()
    CleanMetadata()(littered)
    assert LOCAL.encode() not in ir.to_proto(littered).SerializeToString()
    check_metadata(littered)


def test_own_metadata_and_names_are_kept(littered: ir.Model):
    littered.metadata_props["treeq.layers"] = "[]"
    nodes, initializers = list(littered.graph), list(littered.graph.initializers)
    CleanMetadata()(littered)
    assert littered.metadata_props == {"treeq.layers": "[]"}
    assert list(littered.graph) == nodes
    assert list(littered.graph.initializers) == initializers
    assert (littered.producer_name, littered.producer_version) == ("treeq-export", __version__)


@pytest.mark.parametrize("where", ["node", "node doc string", "value", "initializer", "function"])
def test_check_finds_what_is_left(littered: ir.Model, where: str):
    CleanMetadata()(littered)
    node = littered.graph[0]
    holders = {
        "node": node,
        "value": node.outputs[0],
        "initializer": node.inputs[1],
        "function": next(iter(littered.functions.values()))[0],
    }
    if where == "node doc string":
        node.doc_string = LOCAL
    else:
        holders[where].metadata_props["stack_trace"] = LOCAL
    with pytest.raises(CompileError, match="CleanMetadata"):
        check_metadata(littered)
