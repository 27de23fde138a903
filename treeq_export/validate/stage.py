"""The validate stage: every target of a run, layer by layer and as a whole."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from treeq_export.model.zoo import Denoiser
from treeq_export.plan import Plan
from treeq_export.progress import OnStep
from treeq_export.recipe import ValidateSection
from treeq_export.records import ParityRecord, TargetParity, save_record
from treeq_export.run_folder import RunFolder
from treeq_export.runners.graph_meta import load_layers
from treeq_export.runners.reference_trace import make_reference
from treeq_export.targets.table import different_ways
from treeq_export.validate.compare import compare_compiled, count_steps
from treeq_export.validate.gates import judge


def run_validate(
    run: Path,
    denoiser: Denoiser,
    plan: Plan,
    tensors: Mapping[str, NDArray[Any]],
    targets: Iterable[str],
    section: ValidateSection,
    seed: int,
    on_step: OnStep,
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
        with way.open(run / RunFolder.graph(way.target)) as runner:
            output = runner.run(reference.trace.inputs)
        compared = compare_compiled(run, way, reference, model, sites)
        layers = list(count_steps(compared, index * num, len(ways) * num, on_step))
        entries.append(judge(reference, way, output, layers, section.gates))
    record = ParityRecord(batch_size=section.batch_size, seed=seed, targets=entries)
    save_record(run / RunFolder.PARITY, record)
    return record
