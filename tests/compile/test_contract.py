"""Passes that break their word are refused, with their name, and what they lost."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from onnx_ir.passes import PassResult

from tests.hand_layers import lower
from treeq_export.compile.graph.contract import LayerPass, RewritePass, refuse
from treeq_export.compile.passes.add_function_bodies import AddFunctionBodies
from treeq_export.compile.passes.half_body import HalfBody
from treeq_export.compile.passes.lower_native import LowerNative
from treeq_export.compile.passes.lower_weight_only import LowerWeightOnly
from treeq_export.compile.passes.name_layers import NameLayers
from treeq_export.errors import CompileError
from treeq_export.runners.graph_meta import read_layers

Make = Callable[..., Any]
PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture
def named(make_layer: Make, make_model: Make) -> ir.Model:
    """A graph of one layer that is listed in the metadata."""
    model = make_model(make_layer())
    NameLayers()(model)
    return model


class Rename(LayerPass):
    """Gives something of the first layer another name."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what

    def call(self, model: ir.Model) -> PassResult:
        node = model.graph[0]
        renamed = {"node": node, "input": model.graph.inputs[0], "output": node.outputs[0]}
        renamed[self._what].name = "other"
        return PassResult(model, True)


def test_a_lost_output_is_refused(named: ir.Model):
    [site] = read_layers(named)
    lost = rf"pass Rename: {site.name}: its value {site.output} is gone\. Leave the target out"
    with pytest.raises(CompileError, match=lost):
        Rename("output")(named)


def test_a_lost_node_is_refused(named: ir.Model):
    with pytest.raises(CompileError, match=r"pass Rename: other: belongs to no layer\."):
        Rename("node")(named)


def test_the_input_of_a_layer_is_followed(named: ir.Model):
    Rename("input")(named)
    assert [site.input for site in read_layers(named)] == ["other"]


class Lazy(RewritePass[ir.Node]):
    """Does nothing about what it finds."""

    def _find(self, model: ir.Model) -> Iterator[ir.Node]:
        yield from model.graph

    def _rewrite(self, model: ir.Model, found: ir.Node) -> None:
        del model, found


def test_what_is_left_to_rewrite_is_refused(named: ir.Model):
    with pytest.raises(CompileError, match=r"pass Lazy: .* is left\."):
        Lazy()(named)


class Demanding(LayerPass):
    """Accepts no node at all."""

    def requires(self, model: ir.Model) -> None:
        refuse(model.graph, "should not exist.")

    def call(self, model: ir.Model) -> PassResult:
        raise AssertionError


def test_what_a_pass_requires_is_checked_before_it(named: ir.Model):
    with pytest.raises(CompileError, match=r"pass Demanding: blocks\.0\.fc: should not exist\."):
        Demanding()(named)


ORDERS: dict[str, tuple[str, LayerPass, str]] = {
    "bodies of unmarked plugins": ("ort", AddFunctionBodies(half=True), "is no plugin"),
    "float16 after Q/DQ": ("portable", HalfBody(), "is lowered already"),
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_wrong_order_is_refused(order: str, make_layer: Make, make_model: Make):
    target, wrong, problem = ORDERS[order]
    model = lower(make_model(make_layer()), target)
    with pytest.raises(CompileError, match=f"pass {type(wrong).__name__}: .*{problem}"):
        wrong(model)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [(LowerNative(), "has no Int8 product"), (LowerWeightOnly(half=True), "reads float32")],
)
def test_a_missing_pass_is_noticed(
    wrong: LayerPass, problem: str, make_layer: Make, make_model: Make
):
    model = make_model(make_layer(act_bits=None, act_scale="none"))
    NameLayers()(model)
    with pytest.raises(CompileError, match=f"pass {type(wrong).__name__}: .*{problem}"):
        wrong(model)


def test_the_pass_of_the_page_does_what_it_says(named: ir.Model):
    section = PAGE.read_text().partition("## Add a graph pass")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    space: dict[str, Any] = {}
    exec(code[1], space)
    layer, x = named.graph[0], named.graph.inputs[0]
    same = ir.node("Identity", [x])
    named.graph.insert_before(layer, same)
    layer.replace_input_with(0, same.outputs[0])
    assert space["DropIdentity"]()(named).modified
    assert list(named.graph) == [layer]
    assert layer.inputs[0] is x
