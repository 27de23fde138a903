"""The first layer, in execution order, whose own error, codes or sums are out of bounds.

Every layer is fed with the reference's input, so a fault is found where it is and nowhere else. The
layers' outputs inside the network say besides where an error first becomes visible there.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from treeq_export.bisect.cuda import CUDA, compare_cuda
from treeq_export.errors import PlanError
from treeq_export.model.quantized import linear_of, quantize_model, quantized_layers
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import Plan
from treeq_export.recipe import ParityGates, ValidateSection
from treeq_export.records import LayerParity
from treeq_export.records.base import Record
from treeq_export.runners.compiled import (
    TENSORRT_TARGETS,
    load_compiled,
    model_path,
    read_layers,
    uses_kernels,
)
from treeq_export.runners.cuda_runner import CudaRunner
from treeq_export.runners.kernel_probe import KernelProbe
from treeq_export.runners.layer_probe import LayerProbe
from treeq_export.validate import Trace, compare_layer, run_with_layers, trace_reference


class BisectRecord(Record):
    """Result of bisect.

    Attributes:
        target: What was compared with the reference.
        layer: The first layer out of bounds; None where all are within.
        reasons: What is out of bounds there, with value and limit.
        parity: That layer's comparison.
        departed: The first layer whose output inside the network is too far from the
            reference's; None where there is none before `layer`, or outputs inside are not known.
        num_examined: Layers that were looked at.
        num_layers: Layers of the plan.
        min_sqnr_db: Least SQNR of a layer that counts as within bounds.
    """

    target: str
    layer: str | None
    reasons: list[str]
    parity: LayerParity | None
    departed: str | None
    num_examined: int
    num_layers: int
    min_sqnr_db: float

    def sentence(self) -> str:
        """Return the result in words."""
        if self.layer is None:
            return f"{self.target}: all {self.num_layers} layers are within bounds."
        return (
            f"{self.target}: {self.layer} is the first layer out of bounds "
            f"({self.num_examined} of {self.num_layers}): {'; '.join(self.reasons)}."
        )


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
    model = load_compiled(run, target)
    sites = read_layers(model)
    if {site.name for site in sites} != {layer.name for layer in plan.layers}:
        raise PlanError(
            f"{model_path(run, target)}: holds {len(sites)} layers, the plan {len(plan.layers)}. "
            f"Run `treeq-export compile --run {run}` again."
        )
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
            half=target in TENSORRT_TARGETS,
        )


def run_bisect(
    run: Path,
    denoiser: Denoiser,
    plan: Plan,
    tensors: Mapping[str, NDArray[Any]],
    target: str,
    section: ValidateSection,
    seed: int,
    on_step: Callable[[float], None],
    *,
    min_sqnr_db: float | None = None,
) -> BisectRecord:
    """Find the first layer of a target that is out of bounds.

    Args:
        run: The run folder.
        denoiser: The full-precision model.
        plan: The calibrated plan.
        tensors: Its tensors.
        target: A compiled target, "ort_body", or "cuda" for the Triton kernels in PyTorch.
        section: The recipe's validate section: batch size and limits.
        seed: Seed of the inputs.
        on_step: Called with the fraction done, 0..1.
        min_sqnr_db: Instead of the recipe's `min_layer_sqnr_db`.

    Raises:
        PlanError: The target is missing, or of another plan.
        RunnerError: The target cannot run here.
    """
    limits = section.gates
    if min_sqnr_db is not None:
        limits = limits.model_copy(update={"min_layer_sqnr_db": min_sqnr_db})
    quantized = quantize_model(denoiser, plan, tensors)
    trace = trace_reference(quantized, denoiser.make_example_inputs(section.batch_size, seed))
    num = len(plan.layers)
    with ExitStack() as stack:
        if target == CUDA:
            runner = stack.enter_context(CudaRunner(quantized, use_graphs=False))
            layers = compare_cuda(runner, denoiser, quantized, plan, trace)
        else:
            layers = compare_compiled(run, target, denoiser, quantized, plan, trace)
        return find_first_fault(target, _counted(layers, num, on_step), num, limits)


def _counted(
    layers: Iterable[LayerParity], num: int, on_step: Callable[[float], None]
) -> Iterator[LayerParity]:
    for index, layer in enumerate(layers):
        on_step((index + 1) / num)
        yield layer
