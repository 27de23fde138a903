"""The first layer, in execution order, whose own error, codes or sums are out of bounds.

Every layer is fed with the reference's input, so a fault is found where it is and nowhere else. The
layers' outputs inside the network say besides where an error first becomes visible there.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from treeq_export.bisect.record import BisectRecord
from treeq_export.model.quantized import linear_of, quantized_layers
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import Plan
from treeq_export.recipe import ParityGates
from treeq_export.records import LayerParity
from treeq_export.runners.compiled import uses_kernels
from treeq_export.runners.graph_meta import load_layers
from treeq_export.runners.kernel_probe import KernelProbe
from treeq_export.runners.layer_probe import LayerProbe
from treeq_export.targets.names import ENGINES
from treeq_export.validate import Trace, compare_layer, run_with_layers


def reasons_of(layer: LayerParity, limits: ParityGates) -> list[str]:
    """Return what is out of bounds in one layer; nan never is within."""
    reasons = []
    if not layer.sqnr_db >= limits.min_layer_sqnr_db:
        reasons.append(f"own sqnr {layer.sqnr_db:.1f} dB < {limits.min_layer_sqnr_db:g} dB")
    fraction = layer.equal_code_fraction
    if fraction is not None and not fraction >= limits.min_equal_code_fraction:
        reasons.append(f"equal codes {fraction:.6f} < {limits.min_equal_code_fraction:g}")
    if layer.accumulators_equal is False:
        reasons.append("int32 sums differ for equal codes")
    return reasons


def find_first_fault(
    target: str, layers: Iterable[LayerParity], num_layers: int, limits: ParityGates
) -> BisectRecord:
    """Compare layers until one is out of bounds.

    Args:
        target: Name for the record.
        layers: Comparisons in execution order, made as they are asked for.
        num_layers: How many there are.
        limits: The bounds; inside the network `min_layer_sqnr_db` holds too.
    """
    found, reasons, departed, examined = None, [], None, 0
    for layer in layers:
        examined += 1
        inside = layer.propagated_sqnr_db
        if departed is None and inside is not None and not inside >= limits.min_layer_sqnr_db:
            departed = layer.name
        reasons = reasons_of(layer, limits)
        if reasons:
            found = layer
            break
    return BisectRecord(
        target=target,
        layer=None if found is None else found.name,
        reasons=reasons,
        parity=found,
        departed=departed,
        num_examined=examined,
        num_layers=num_layers,
        min_sqnr_db=limits.min_layer_sqnr_db,
    )


def compare_compiled(
    run: Path, target: str, denoiser: Denoiser, quantized: Denoiser, plan: Plan, trace: Trace
) -> Iterator[LayerParity]:
    """Yield the comparison of every layer of a compiled graph, in execution order.

    Raises:
        PlanError: The target is missing, or was compiled from another plan's layers.
    """
    model, sites = load_layers(run, target, [layer.name for layer in plan.layers])
    inside = run_with_layers(run, target, sites, trace)
    references = quantized_layers(quantized)
    make_probe = KernelProbe if uses_kernels(target) else LayerProbe
    for site in sites:
        full = linear_of(denoiser, plan.layer(site.name))
        yield compare_layer(
            make_probe(model, site),
            references[site.name],
            full,
            trace,
            inside.get(site.output),
            half=target in ENGINES,
        )
