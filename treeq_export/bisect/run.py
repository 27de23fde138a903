"""Bisect of any target: which way it can be looked into."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from treeq_export.bisect.cuda import CUDA, compare_cuda
from treeq_export.bisect.network import ENGINES, bisect_engine
from treeq_export.bisect.own import BisectRecord, find_first_fault
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import Plan
from treeq_export.progress import OnStep
from treeq_export.recipe import ValidateSection
from treeq_export.runners.cuda_runner import CudaRunner
from treeq_export.runners.graph_meta import load_layers
from treeq_export.runners.reference_trace import make_reference
from treeq_export.targets.table import way_named
from treeq_export.validate.compare import compare_compiled, count_steps


def run_bisect(
    run: Path,
    denoiser: Denoiser,
    plan: Plan,
    tensors: Mapping[str, NDArray[Any]],
    target: str,
    section: ValidateSection,
    seed: int,
    on_step: OnStep,
    *,
    min_sqnr_db: float | None = None,
) -> BisectRecord:
    """Find the first layer of a target that is out of bounds.

    Args:
        run: The run folder.
        denoiser: The full-precision model.
        plan: The calibrated plan.
        tensors: The plan's tensors.
        target: A compiled target; "ort_body"; "cuda" for the Triton kernels in PyTorch; or an
            engine's folder in the run, "engines/<runtime>/<target>/<gpu>".
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
    reference = make_reference(denoiser, plan, tensors, section.batch_size, seed)
    trace, num = reference.trace, len(plan.layers)
    if target.startswith(ENGINES):
        return bisect_engine(run, target, trace, limits.min_layer_sqnr_db, on_step)
    with ExitStack() as stack:
        if target == CUDA:
            runner = stack.enter_context(CudaRunner(reference.quantized, use_graphs=False))
            layers = compare_cuda(runner, reference)
        else:
            way = way_named(target)
            graph = load_layers(run, way.target, trace.layer_inputs)
            layers = compare_compiled(run, way, reference, *graph)
        return find_first_fault(target, count_steps(layers, 0, num, on_step), num, limits)
