"""The validate stage: every layer of every target against the PyTorch reference, then the whole.

Reference: the fake-quantized model of model/qlinear.py, whose arithmetic tests hold equal to
quant/numerics.py. For each layer of each target:

    own error          the target's layer on the reference's input, so that no error of earlier
                       layers is in it; with it the activation codes, and the int32 sums
    propagated error   the layer's output inside the whole network

The layers of a float16 body are fed the reference's input rounded to float16, and compared with
the reference on the same rounded input: what rounding it costs belongs to the layers before. End to
end such a body is held to what the reference itself reaches when the outputs of its modules are
rounded so: at few bits that rounding moves codes. The record says where ONNX Runtime emulates a
target: that proves the graph, and an engine only as far as TensorRT obeys it.

A code flips where x' / s_x lies so close to a rounding border that another order of summation in
the rotation or the rms moves it across; equal-code fractions just below 1 are these. Given equal
codes the int32 sums have to be equal bit for bit.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from treeq_export.model.qlinear import QLinear
from treeq_export.model.quantized import linear_of, quantized_layers
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import Plan
from treeq_export.quant.metrics import equal_code_fraction, max_abs_error, sqnr_db
from treeq_export.recipe import ParityGates, ValidateSection
from treeq_export.records import (
    EMULATED,
    ORT_CPU,
    GateResult,
    LayerParity,
    ParityRecord,
    TargetParity,
    save_record,
)
from treeq_export.runners.graph_file import runnable
from treeq_export.runners.graph_meta import LayerSite, load_compiled, load_layers
from treeq_export.runners.model_files import model_path
from treeq_export.runners.protocols import Probe
from treeq_export.runners.reference_trace import (
    Reference,
    Trace,
    make_reference,
)
from treeq_export.runners.ways import Way
from treeq_export.targets.table import different_ways

RECORD_FILE = "parity.json"

Array = NDArray[Any]


def reference_codes(layer: QLinear, x: Array) -> Array | None:
    """Return the reference's activation codes (..., K), None for weight-only layers."""
    if layer.layer.activation.bits is None:
        return None
    with torch.no_grad():
        rotated = layer.rotate(torch.from_numpy(x))
        return layer.quantize(rotated, layer.activation_scale(rotated)).numpy()


def sums_equal(layer: QLinear, codes: Array, sums: Array) -> bool:
    """Whether a target's sums equal the reference's for the target's own codes.

    Args:
        layer: The reference layer.
        codes: (..., K) int8, from the target.
        sums: (..., G, N), int32 or the float32 of an int32, from the target.
    """
    with torch.no_grad():
        expected = layer.accumulate(torch.from_numpy(codes.astype(np.float64))).numpy()
    return bool(np.array_equal(expected.astype(sums.dtype), sums))


def compare_layer(
    probe: Probe,
    layer: QLinear,
    full: nn.Linear,
    trace: Trace,
    propagated: Array | None,
    half: bool = False,
) -> LayerParity:
    """Compare one layer of a target with the reference.

    Args:
        probe: The target's layer.
        layer: The reference layer.
        full: The full-precision layer.
        trace: The reference's inputs and outputs.
        propagated: The layer's output inside the target's whole network; None where that value
            became part of a fused node.
        half: Whether the target holds activations in float16.
    """
    x, inside = trace.layer_inputs[probe.name], trace.layer_outputs[probe.name]
    y = inside
    if half:
        x = x.astype(np.float16).astype(np.float32)
        with torch.no_grad():
            y = layer(torch.from_numpy(x)).numpy()
    received, codes = probe.run_output(x)
    expected_codes = reference_codes(layer, x)
    fraction, equal = None, None
    if codes is not None and expected_codes is not None:
        fraction = equal_code_fraction(expected_codes, codes)
        sums = probe.run_accumulators(x)
        equal = sums is not None and sums_equal(layer, codes, sums)
    with torch.no_grad():
        full_y = full(torch.from_numpy(x)).numpy()
    return LayerParity(
        name=probe.name,
        sqnr_db=sqnr_db(y, received),
        max_abs_error=max_abs_error(y, received),
        equal_code_fraction=fraction,
        accumulators_equal=equal,
        propagated_sqnr_db=(
            None if propagated is None else sqnr_db(inside, propagated.astype(np.float32))
        ),
        quantization_sqnr_db=sqnr_db(full_y, y),
    )


def compare_layers(
    reference: Reference, probes: Iterable[Probe], inside: Mapping[str, Array], half: bool = False
) -> Iterator[LayerParity]:
    """Yield the comparison of every layer, as it is asked for.

    Args:
        reference: The reference.
        probes: The target's layers, in execution order.
        inside: Outputs inside the target's whole network by layer name, as far as they exist.
        half: Whether the target holds activations in float16.
    """
    layers = quantized_layers(reference.quantized)
    for probe in probes:
        full = linear_of(reference.denoiser, reference.plan.layer(probe.name))
        propagated = inside.get(probe.name)
        yield compare_layer(probe, layers[probe.name], full, reference.trace, propagated, half)


def compare_compiled(
    run: Path, way: Way, reference: Reference, model: ir.Model, sites: Sequence[LayerSite]
) -> Iterator[LayerParity]:
    """Yield the comparison of every layer of a compiled graph, in execution order.

    Args:
        run: The run folder.
        way: How the graph is run.
        reference: The reference.
        model: The compiled graph.
        sites: The graph's layers.
    """
    inside = _run_inside(run, way, sites, reference.trace)
    probes = (way.probe(model, site) for site in sites)
    yield from compare_layers(reference, probes, inside, way.half)


def _run_inside(run: Path, way: Way, sites: Sequence[LayerSite], trace: Trace) -> dict[str, Array]:
    """Run a whole graph and return the output of every layer that has one, by layer name."""
    model = load_compiled(run, way.target)
    values = ir.convenience.create_value_mapping(model.graph)
    present = {value.name for value in model.graph.outputs}
    seen = [site for site in sites if site.output]
    model.graph.outputs.extend(values[site.output] for site in seen if site.output not in present)
    with runnable(model, run) as source, way.open(source) as runner:
        outputs = runner.run_all(trace.inputs)
    return {site.name: outputs[site.output] for site in seen}


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
        name: What the gates call the target.
        sqnr: SQNR of the network's output, dB.
        layers: The target's layers.
        limits: The recipe's limits.
        half_rounding_db: What `measure_half_rounding` gave, for a target with a float16 body.
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
    output: Array,
    layers: list[LayerParity],
    limits: ParityGates,
) -> TargetParity:
    """Judge what a target computed.

    Args:
        reference: The reference.
        way: How the target was run.
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


def count_steps(
    layers: Iterable[LayerParity], before: int, total: int, on_step: Callable[[float], None]
) -> Iterator[LayerParity]:
    """Yield comparisons and tell after each which fraction of all is done.

    Args:
        layers: The comparisons.
        before: How many were made before.
        total: How many there will be in all.
        on_step: Called with the fraction done, 0..1.
    """
    for index, layer in enumerate(layers, start=before + 1):
        on_step(index / total)
        yield layer


def run_validate(
    run: Path,
    denoiser: Denoiser,
    plan: Plan,
    tensors: Mapping[str, Array],
    targets: Iterable[str],
    section: ValidateSection,
    seed: int,
    on_step: Callable[[float], None],
) -> ParityRecord:
    """Compare every target with the reference and write `parity.json`.

    Args:
        run: The run folder.
        denoiser: The full-precision model.
        plan: The calibrated plan.
        tensors: The plan's tensors.
        targets: Compiled targets; each is compared in every way that differs here.
        section: The recipe's validate section.
        seed: Seed of the inputs.
        on_step: Called with the fraction done, 0..1.

    Returns:
        The record; gates that are not met are in it, nothing is raised for them.

    Raises:
        PlanError: A target is missing or of another plan.
    """
    reference = make_reference(denoiser, plan, tensors, section.batch_size, seed)
    ways = different_ways(targets)
    num = len(plan.layers)
    entries: list[TargetParity] = []
    for index, way in enumerate(ways):
        model, sites = load_layers(run, way.target, reference.trace.layer_inputs)
        with way.open(model_path(run, way.target)) as runner:
            output = runner.run(reference.trace.inputs)
        compared = compare_compiled(run, way, reference, model, sites)
        layers = list(count_steps(compared, index * num, len(ways) * num, on_step))
        entries.append(judge(reference, way, output, layers, section.gates))
    record = ParityRecord(batch_size=section.batch_size, seed=seed, targets=entries)
    save_record(run / RECORD_FILE, record)
    return record
