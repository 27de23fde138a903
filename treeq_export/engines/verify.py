"""The verifier: does an engine obey the plan?

Rules, for each layer of the plan and the engine layers that its product's ONNX nodes became:

1. A quantized layer is a plugin, or an Int8 gemm; each product that it became is Int8. Kernels that
   only prepare operands or apply scales carry the same node's name and do not count.
2. A weight-only layer is neither.
3. No plugin and no Int8 gemm is made of a product that belongs to no quantized layer.
"""

from collections.abc import Mapping, Sequence

from treeq_export.engines.graph_facts import GraphFacts
from treeq_export.engines.layer_list import EngineLayer
from treeq_export.errors import CompileError
from treeq_export.records.build import Planned, VerifiedLayer, VerifierSummary, VerifierTable

PLUGIN, INT8_GEMM = "plugin", "int8 gemm"
_NOT_FOUND = "not found"
_INTEGER = frozenset({PLUGIN, INT8_GEMM})
_SHOWN = 5

Bits = Mapping[str, tuple[int, int]]


def verify(facts: GraphFacts, engine: Sequence[EngineLayer], bits: Bits) -> VerifierTable:
    """Return what became of every planned layer; nothing is raised.

    Args:
        facts: Facts of the graph that the engine was built from.
        engine: The engine's layers.
        bits: Weight and activation bits by layer of the plan; activation 0 is weight-only.
    """
    layers = [
        _verify_layer(name, act_bits, facts.products.get(name, frozenset()), engine)
        for name, (_, act_bits) in bits.items()
    ]
    strangers = _find_strangers(facts, engine, bits)
    quantized = [layer for layer in layers if layer.planned == "quantized"]
    summary = VerifierSummary(
        num_quantized=len(quantized),
        num_plugins=sum(layer.became == PLUGIN for layer in quantized),
        num_int8_gemms=sum(layer.became == INT8_GEMM for layer in quantized),
        num_weight_only=len(layers) - len(quantized),
        num_engine_layers=len(engine),
    )
    return VerifierTable(summary=summary, layers=layers + strangers)


def _verify_layer(
    name: str, act_bits: int, nodes: frozenset[str], engine: Sequence[EngineLayer]
) -> VerifiedLayer:
    mine = [layer for layer in engine if layer.nodes & nodes]
    doing = [layer for layer in mine if layer.is_plugin or layer.is_product]
    planned: Planned = "quantized" if act_bits else "weight-only"
    became = _describe(doing or mine)
    passed = bool(doing or mine) and (became in _INTEGER) == (planned == "quantized")
    return VerifiedLayer(
        name=name,
        planned=planned,
        became=became,
        engine_layers=[layer.name for layer in doing or mine],
        passed=passed,
    )


def _describe(layers: Sequence[EngineLayer]) -> str:
    """Return what layers are, in one word where all are the same."""
    if not layers:
        return _NOT_FOUND
    if all(layer.is_plugin for layer in layers):
        return PLUGIN
    if all(layer.is_int8_product for layer in layers):
        return INT8_GEMM
    return " + ".join(dict.fromkeys(layer.description for layer in layers))


def _find_strangers(
    facts: GraphFacts, engine: Sequence[EngineLayer], bits: Bits
) -> list[VerifiedLayer]:
    """Return the integer layers of the engine that are made of what the plan leaves alone."""
    # A weight-only layer that became an integer one fails under its own name.
    known = {node for name in bits for node in facts.products.get(name, ())}
    known |= {node for node, layer in facts.branches.items() if layer in bits}
    found = []
    for layer in engine:
        if not (layer.is_plugin or layer.is_int8_product):
            continue
        # What says nothing of its origin cannot be a planned layer.
        own = layer.nodes & facts.all_products if layer.nodes else frozenset({layer.name})
        found += [
            VerifiedLayer(
                name=node,
                planned="floating-point",
                became=PLUGIN if layer.is_plugin else INT8_GEMM,
                engine_layers=[layer.name],
                passed=False,
            )
            for node in sorted(own - known)
        ]
    return found


def check(where: str, table: VerifierTable) -> None:
    """Fail where a layer does not obey the plan.

    Args:
        where: The engine, for the message.
        table: From `verify`.

    Raises:
        CompileError: Names the layers and what became of them.
    """
    wrong = [layer for layer in table.layers if not layer.passed]
    if not wrong:
        return
    named = "; ".join(f"{w.name} ({w.planned}) became {w.became}" for w in wrong[:_SHOWN])
    more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    raise CompileError(
        f"{where}: the engine does not obey the plan: {named}{more}. Expected a plugin or an Int8 "
        "gemm for quantized layers and neither elsewhere. Compile again with this treeq-export; "
        "if it stays, leave these layers out of the plan."
    )
