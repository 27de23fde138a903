"""The validate stage: every layer of every target against the PyTorch reference, then the whole.

Reference: the fake-quantized model of model/qlinear.py, whose arithmetic tests hold equal to
quant/numerics.py. For each layer of each target:

    own error          the target's layer on the reference's input, so that no error of earlier
                       layers is in it; with it the activation codes, and the int32 sums
    propagated error   the layer's output inside the whole network

The targets of TensorRT have a float16 body. Their layers are fed the reference's input rounded to
float16, and compared with the reference on the same rounded input: what rounding it costs belongs
to the layers before. End to end they are held to what the reference itself reaches when the outputs
of its modules are rounded so: at few bits that rounding moves codes. Here ONNX Runtime runs them on
the CPU, which the record says: it proves the graph, and an engine only as far as TensorRT obeys it.

A code flips where x' / s_x lies so close to a rounding border that another order of summation in
the rotation or the rms moves it across; equal-code fractions just below 1 are these. Given equal
codes the int32 sums have to be equal bit for bit.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from treeq_export.model.qlinear import QLinear
from treeq_export.model.quantized import linear_of, quantize_model, quantized_layers
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
from treeq_export.runners.compiled import open_target, runner_options, uses_kernels, ways_to_run
from treeq_export.runners.graph_file import runnable
from treeq_export.runners.graph_meta import LayerSite, load_compiled, load_layers
from treeq_export.runners.kernel_probe import KernelProbe
from treeq_export.runners.layer_probe import LayerProbe
from treeq_export.runners.model_files import model_path
from treeq_export.runners.ort_runner import OrtRunner
from treeq_export.runners.reference_trace import (
    Trace,
    find_half_overflow,
    measure_half_rounding,
    trace_reference,
)
from treeq_export.targets.names import ENGINES

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
    probe: LayerProbe | KernelProbe,
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
    name = probe.site.name
    x, inside = trace.layer_inputs[name], trace.layer_outputs[name]
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
        name=name,
        sqnr_db=sqnr_db(y, received),
        max_abs_error=max_abs_error(y, received),
        equal_code_fraction=fraction,
        accumulators_equal=equal,
        propagated_sqnr_db=_propagated_sqnr(inside, propagated),
        quantization_sqnr_db=sqnr_db(full_y, y),
    )


def _propagated_sqnr(y: Array, received: Array | None) -> float | None:
    return None if received is None else sqnr_db(y, received.astype(np.float32))


def run_with_layers(
    run: Path, target: str, sites: list[LayerSite], trace: Trace
) -> Mapping[str, Array]:
    """Run a target's whole network and return every layer's output by value name."""
    model = load_compiled(run, target)
    values = ir.convenience.create_value_mapping(model.graph)
    present = {value.name for value in model.graph.outputs}
    for site in sites:
        if site.output and site.output not in present:
            model.graph.outputs.append(values[site.output])
    options = runner_options(model_path(run, target), target)
    with runnable(model, run) as source, OrtRunner(source, **options) as runner:
        return runner.run_all(trace.inputs)


def make_gates(
    target: str,
    sqnr: float,
    layers: list[LayerParity],
    limits: ParityGates,
    half_rounding_db: float | None = None,
    overflow: str | None = None,
) -> list[GateResult]:
    """Return the parity gates of one target; layer gates name the worst layer.

    Args:
        target: Its name.
        sqnr: End to end, dB.
        layers: Its layers.
        limits: The recipe's.
        half_rounding_db: What `measure_half_rounding` gave, for a target with a float16 body.
        overflow: The module from which on float16 cannot hold the values; None where it can.
    """
    least = limits.min_end_to_end_sqnr_db
    if half_rounding_db is not None:
        target = f"{target} (emulated)"
        least = min(least, half_rounding_db - limits.half_margin_db)
    name = f"{target}: end-to-end sqnr_db"
    if overflow is not None:
        name += f" (float16 overflows from {overflow} on; use target ort or portable)"
    gates = [GateResult.of(name, sqnr, least, at_least=True)]
    worst = min(layers, key=lambda layer: _nan_is_least(layer.sqnr_db))
    gates.append(
        GateResult.of(
            f"{target}: own sqnr_db of the worst layer ({worst.name})",
            worst.sqnr_db,
            limits.min_layer_sqnr_db,
            at_least=True,
        )
    )
    coded = [layer for layer in layers if layer.equal_code_fraction is not None]
    if coded:
        worst = min(coded, key=lambda layer: _nan_is_least(layer.equal_code_fraction or 0.0))
        gates.append(
            GateResult.of(
                f"{target}: equal codes of the worst layer ({worst.name})",
                worst.equal_code_fraction or 0.0,
                limits.min_equal_code_fraction,
                at_least=True,
            )
        )
        unequal = [layer.name for layer in coded if layer.accumulators_equal is not True]
        named = f" (not {unequal[0]})" if unequal else ""
        gates.append(
            GateResult.of(
                f"{target}: layers with equal int32 sums{named}",
                len(coded) - len(unequal),
                len(coded),
                at_least=True,
            )
        )
    return gates


def _nan_is_least(value: float) -> float:
    """Return a key under which min() finds nan wherever it stands."""
    return -math.inf if math.isnan(value) else value


def compare_target(
    run: Path,
    target: str,
    denoiser: Denoiser,
    quantized: Denoiser,
    plan: Plan,
    trace: Trace,
    limits: ParityGates,
    on_layer: Callable[[], None],
    half_rounding_db: float | None,
    overflow: str | None = None,
) -> TargetParity:
    """Compare one compiled target with the reference.

    Args:
        run: The run folder.
        target: As `ways_to_run` names it.
        denoiser: The full-precision model.
        quantized: The reference.
        plan: Its plan.
        trace: What the reference computed.
        limits: The recipe's gates.
        on_layer: Called after every layer.
        half_rounding_db: See `make_gates`; None for a float32 body.
        overflow: See `make_gates`.

    Returns:
        What was measured.

    Raises:
        PlanError: The target is missing, or was compiled from another plan's layers.
    """
    model, sites = load_layers(run, target, [layer.name for layer in plan.layers])
    with open_target(run, target) as runner:
        output = runner.run(trace.inputs)
    inside = run_with_layers(run, target, sites, trace)
    references = quantized_layers(quantized)
    make_probe = KernelProbe if uses_kernels(target) else LayerProbe
    layers = []
    for site in sites:
        full = linear_of(denoiser, plan.layer(site.name))
        probe = make_probe(model, site)
        propagated = inside.get(site.output)
        layers.append(
            compare_layer(
                probe,
                references[site.name],
                full,
                trace,
                propagated,
                half=half_rounding_db is not None,
            )
        )
        on_layer()
    sqnr = sqnr_db(trace.output, output)
    gates = make_gates(target, sqnr, layers, limits, half_rounding_db, overflow)
    return TargetParity(
        target=target,
        runtime=ORT_CPU if half_rounding_db is None else EMULATED,
        passed=all(gate.passed for gate in gates),
        sqnr_db=sqnr,
        max_abs_error=max_abs_error(trace.output, output),
        layers=layers,
        gates=gates,
    )


def run_validate(
    run: Path,
    denoiser: Denoiser,
    plan: Plan,
    tensors: Mapping[str, Array],
    targets: list[str],
    section: ValidateSection,
    seed: int,
    on_step: Callable[[float], None],
) -> ParityRecord:
    """Compare every target with the reference and write `parity.json`.

    Args:
        run: The run folder.
        denoiser: The full-precision model.
        plan: The calibrated plan.
        tensors: Its tensors.
        targets: Compiled targets; "ort" is compared with our kernels and without them.
        section: The recipe's validate section.
        seed: Seed of the inputs.
        on_step: Called with the fraction done, 0..1.

    Returns:
        The record; gates that are not met are in it, nothing is raised for them.

    Raises:
        PlanError: A target is missing or of another plan.
    """
    quantized = quantize_model(denoiser, plan, tensors)
    inputs = denoiser.make_example_inputs(section.batch_size, seed)
    trace = trace_reference(quantized, inputs)
    ways = ways_to_run(targets)
    total, done = len(ways) * len(plan.layers), 0

    def count() -> None:
        nonlocal done
        done += 1
        on_step(done / total)

    halves = set(ENGINES) & set(ways)
    rounding = measure_half_rounding(quantized, trace) if halves else None
    overflow = None
    if rounding is not None and not math.isfinite(rounding):
        overflow = find_half_overflow(quantized, trace)
    record = ParityRecord(
        batch_size=section.batch_size,
        seed=seed,
        targets=[
            compare_target(
                run,
                target,
                denoiser,
                quantized,
                plan,
                trace,
                section.gates,
                count,
                rounding if target in halves else None,
                overflow if target in halves else None,
            )
            for target in ways
        ],
    )
    save_record(run / RECORD_FILE, record)
    return record
