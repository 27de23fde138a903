"""Every layer of a target against the PyTorch reference, which also bisect looks through.

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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from treeq_export.model.qlinear import QLinear
from treeq_export.model.quantized import linear_of, quantized_layers
from treeq_export.progress import OnStep
from treeq_export.quant.metrics import equal_code_fraction, max_abs_error, sqnr_db
from treeq_export.records import LayerParity
from treeq_export.runners.graph_file import runnable
from treeq_export.runners.graph_meta import LayerSite, load_compiled
from treeq_export.runners.protocols import Probe
from treeq_export.runners.reference_trace import Reference, Trace
from treeq_export.runners.ways import Way

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
        way: The way the graph is run.
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


def count_steps(
    layers: Iterable[LayerParity], before: int, total: int, on_step: OnStep
) -> Iterator[LayerParity]:
    """Yield comparisons and tell after each which fraction of all is done.

    Args:
        layers: The comparisons.
        before: Number of comparisons made before.
        total: Number of comparisons in all.
        on_step: Called with the fraction done, 0..1.
    """
    for index, layer in enumerate(layers, start=before + 1):
        on_step(index / total)
        yield layer
