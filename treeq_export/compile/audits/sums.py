"""The audit's check of sums: are a target's integer products exact on this processor?

What a node is called does not say so: on x86 without VNNI a product of UINT8 and INT8 saturates. So
layers of the compiled file are run on codes at the ends of their range, and on random ones, and
their int32 sums have to be those of quant/numerics.py. One layer of each kind (bits and groups)
stands for the others: the one whose neighbouring weights add up to most.

A target is run in every way that differs on this machine: one of TensorRT by the runtime that
emulates it, a packed one by its function bodies and, where our library is installed, our kernels.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from treeq_export.errors import CompileError
from treeq_export.plan import LayerPlan, Plan
from treeq_export.quant.grids import INTEGER, Grid
from treeq_export.quant.numerics import accumulate
from treeq_export.quant.spec import WeightFormat
from treeq_export.records import AuditLayer
from treeq_export.runners.graph_meta import read_layers
from treeq_export.runners.kernel_probe import KernelProbe
from treeq_export.runners.layer_probe import LayerProbe
from treeq_export.runners.ways import Way

ROWS = 8
Kind = tuple[WeightFormat, int | None, str]


def extreme_codes(
    bits: int, rows: int, columns: int, seed: int = 0, grid: Grid = INTEGER
) -> NDArray[np.int8]:
    """Return levels of a format: rows of least, of largest, of both by turns; random rows.

    Args:
        bits: Bits per code.
        rows: At least 3.
        columns: Codes in a row.
        seed: Seed of the random rows; every second of them has the extremes only.
        grid: The grid of the levels.

    Returns:
        (rows, columns) int8.

    >>> extreme_codes(2, 3, 4).tolist()
    [[-2, -2, -2, -2], [1, 1, 1, 1], [-2, 1, -2, 1]]
    """
    levels, (least, largest) = grid.levels(bits), grid.ends(bits)
    codes = levels[np.random.default_rng(seed).integers(0, len(levels), (rows, columns))]
    codes[0], codes[1] = least, largest
    codes[2] = np.where(np.arange(columns) % 2, largest, least)
    codes[3::2] = np.where(codes[3::2] < 0, least, largest)
    return codes


def audit_sums(
    model: ir.Model, ways: Sequence[Way], plan: Plan, tensors: Mapping[str, NDArray[Any]]
) -> dict[str, bool]:
    """Say which layers' kinds have exact sums here.

    Args:
        model: The compiled model.
        ways: The ways to run it.
        plan: The plan.
        tensors: The plan's tensors, for codes and scales.

    Returns:
        For each layer with quantized activations, whether the sums of its kind are exact.
    """
    sites = {site.name: site for site in read_layers(model)}
    exact: dict[str, bool] = {}
    for layers in _by_kind(layer for layer in plan.layers if layer.name in sites).values():
        worst = max(layers, key=lambda layer: _largest_pair(tensors[f"{layer.name}.codes"]))
        probes = [way.probe(model, sites[worst.name]) for way in ways]
        passed = all(all(_sums_are_exact(worst, tensors, probe)) for probe in probes)
        exact.update({layer.name: passed for layer in layers})
    return exact


def check_sums(
    target: str, audit: Sequence[AuditLayer], plan: Plan, processor: str, sets: Sequence[str]
) -> None:
    """Check that no layer was found to have wrong sums.

    Args:
        target: The target.
        audit: The audit of the target.
        plan: The plan.
        processor: Model name of the processor that the audit ran on.
        sets: The processor's instruction sets.

    Raises:
        CompileError: Names kinds and number of layers, the processor and its instruction sets.
    """
    wrong = [plan.layer(entry.name) for entry in audit if entry.exact_sums is False]
    if wrong:
        kinds = sorted({f"W{layer.weight.bits}A{layer.activation.bits}" for layer in wrong})
        raise CompileError(
            f"target {target}: int32 sums of {len(wrong)} of {len(audit)} layers "
            f"({', '.join(kinds)}; first {wrong[0].name}) are not exact on this processor, "
            f"{processor} ({' '.join(sets) or 'no known instruction sets'}). Use the ONNX Runtime "
            "version of constraints.txt, or leave the target out of compile.targets."
        )


def _by_kind(layers: Iterable[LayerPlan]) -> dict[Kind, list[LayerPlan]]:
    kinds: dict[Kind, list[LayerPlan]] = {}
    for layer in layers:
        if layer.activation.bits is not None:
            kind = (layer.weight, layer.activation.bits, layer.activation.grid)
            kinds.setdefault(kind, []).append(layer)
    return kinds


def _largest_pair(codes: NDArray[np.int8]) -> tuple[int, int]:
    """Return the largest |sum| of two neighbouring weights, and the number of input channels."""
    wide = codes.astype(np.int16)
    return int(np.abs(wide[:, 1:] + wide[:, :-1]).max(initial=0)), codes.shape[1]


def _sums_are_exact(
    layer: LayerPlan, tensors: Mapping[str, NDArray[Any]], probe: KernelProbe | LayerProbe
) -> Iterator[bool]:
    """Yield whether sums are exact, of one row, which takes another way in some kernels, and all.

    A sum beyond 2^24 may come back rounded to float32.
    """
    weight, num_groups = _weight_of(layer, tensors)
    for rows in (1, ROWS):
        codes = _codes_of(layer)[-rows:]
        sums = probe.run_products(codes)
        yield np.array_equal(sums, accumulate(codes, weight, num_groups).astype(sums.dtype))


def _weight_of(
    layer: LayerPlan, tensors: Mapping[str, NDArray[Any]]
) -> tuple[NDArray[np.int8], int]:
    """Return a layer's weight codes (N, K) and its scales per output channel."""
    return tensors[f"{layer.name}.codes"], tensors[f"{layer.name}.weight_scale"].shape[1]


def _codes_of(layer: LayerPlan) -> NDArray[np.int8]:
    activation = layer.activation
    assert activation.bits is not None
    return extreme_codes(activation.bits, ROWS, layer.in_features, grid=activation.numbers)
