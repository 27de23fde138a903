"""The bounds of parity: of one layer, and of a whole target."""

import math
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from treeq_export.quant.metrics import max_abs_error, sqnr_db
from treeq_export.recipe import ParityGates
from treeq_export.records import EMULATED, ORT_CPU, GateResult, LayerParity, TargetParity
from treeq_export.runners.reference_trace import Reference
from treeq_export.runners.ways import Way


def missed_bounds(layer: LayerParity, limits: ParityGates) -> list[str]:
    """Return what is out of bounds in one layer, with value and limit; nan never is within."""
    missed: list[str] = []
    if not layer.sqnr_db >= limits.min_layer_sqnr_db:
        missed.append(f"own sqnr {layer.sqnr_db:.1f} dB < {limits.min_layer_sqnr_db:g} dB")
    fraction = layer.equal_code_fraction
    if fraction is not None and not fraction >= limits.min_equal_code_fraction:
        missed.append(f"equal codes {fraction:.6f} < {limits.min_equal_code_fraction:g}")
    if layer.accumulators_equal is False:
        missed.append("int32 sums differ for equal codes")
    return missed


def make_gates(
    name: str,
    sqnr: float,
    layers: Sequence[LayerParity],
    limits: ParityGates,
    half_rounding_db: float | None = None,
    overflow: str | None = None,
) -> list[GateResult]:
    """Return the parity gates of one target; layer gates name the worst layer.

    Args:
        name: The target's name in the gates.
        sqnr: SQNR of the network's output, dB.
        layers: The target's layers.
        limits: The recipe's limits.
        half_rounding_db: The result of `measure_half_rounding`, for a target with a float16 body.
        overflow: The module from which on float16 cannot hold the values; None where it can.
    """
    least = limits.min_end_to_end_sqnr_db
    if half_rounding_db is not None:
        least = min(least, half_rounding_db - limits.half_margin_db)
    end_to_end = "end-to-end sqnr_db"
    if overflow is not None:
        end_to_end += f" (float16 overflows from {overflow} on; use target ort or portable)"
    worst = min(layers, key=lambda layer: _nan_is_least(layer.sqnr_db))
    own = f"own sqnr_db of the worst layer ({worst.name})"
    gates: list[tuple[str, float, float]] = [
        (end_to_end, sqnr, least),
        (own, worst.sqnr_db, limits.min_layer_sqnr_db),
    ]
    coded = {
        layer.name: layer.equal_code_fraction
        for layer in layers
        if layer.equal_code_fraction is not None
    }
    if coded:
        worst_name = min(coded, key=lambda layer: _nan_is_least(coded[layer]))
        unequal = [
            layer.name
            for layer in layers
            if layer.name in coded and layer.accumulators_equal is not True
        ]
        named = f" (not {unequal[0]})" if unequal else ""
        gates += [
            (
                f"equal codes of the worst layer ({worst_name})",
                coded[worst_name],
                limits.min_equal_code_fraction,
            ),
            (f"layers with equal int32 sums{named}", len(coded) - len(unequal), len(coded)),
        ]
    return [
        GateResult.of(f"{name}: {what}", measured, limit, at_least=True)
        for what, measured, limit in gates
    ]


def _nan_is_least(value: float) -> float:
    """Return a key under which min() finds nan wherever it stands."""
    return -math.inf if math.isnan(value) else value


def judge(
    reference: Reference,
    way: Way,
    output: NDArray[Any],
    layers: list[LayerParity],
    limits: ParityGates,
) -> TargetParity:
    """Judge what a target computed.

    Args:
        reference: The reference.
        way: The way the target was run.
        output: The network's output.
        layers: The comparisons of the layers.
        limits: The recipe's limits.
    """
    expected = reference.trace.output
    sqnr = sqnr_db(expected, output)
    name = f"{way.name} (emulated)" if way.emulated else way.name
    rounding = reference.half_rounding_db if way.half else None
    overflow = reference.half_overflow if way.half else None
    gates = make_gates(name, sqnr, layers, limits, rounding, overflow)
    return TargetParity(
        target=way.name,
        runtime=EMULATED if way.emulated else ORT_CPU,
        passed=all(gate.passed for gate in gates),
        sqnr_db=sqnr,
        max_abs_error=max_abs_error(expected, output),
        layers=layers,
        gates=gates,
    )
