"""The compile stage: one model file per target, audited before it takes its final name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from treeq_export.artefacts import atomic_folder, sha256_of_file
from treeq_export.compile.audits.onnx_runtime import check_metadata
from treeq_export.compile.audits.sums import audit_sums, check_sums
from treeq_export.compile.batch_profile import write_batch_profile
from treeq_export.compile.export import export_graph
from treeq_export.environment import read_cpu
from treeq_export.errors import CompileError
from treeq_export.model.quantized import quantize_model
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import Plan, plan_digest
from treeq_export.progress import OnStep
from treeq_export.recipe import CompileSection
from treeq_export.records import AuditLayer, CompiledTarget, CompileRecord, save_record
from treeq_export.run_folder import RunFolder
from treeq_export.runners.graph_file import initializer_bytes
from treeq_export.runners.graph_meta import PLAN_KEY
from treeq_export.runners.model_files import (
    DATA_FILE,
    MODEL_FILE,
    OUR_FILES,
    model_files,
)
from treeq_export.targets.names import FP32
from treeq_export.targets.table import target_named

EXTERNAL_ABOVE_BYTES = 1_500_000_000
_PROTOBUF_LIMIT_BYTES = 2_000_000_000


def save_model(model: ir.Model, path: Path, external_data: str) -> None:
    """Write a model, with its weights beside it where they are large or the recipe says so.

    Args:
        model: The model.
        path: The model file; external data goes to `<path>.data`.
        external_data: "auto", "always" or "never".

    Raises:
        CompileError: "never" for a model above protobuf's limit of 2 GB.
    """
    size = initializer_bytes(model)
    if external_data == "never" and size > _PROTOBUF_LIMIT_BYTES:
        raise CompileError(
            f"{path}: {size / 1e9:.1f} GB of weights do not fit one ONNX file (2 GB). "
            "Set compile.external_data to auto or always."
        )
    external = external_data == "always" or (
        external_data == "auto" and size > EXTERNAL_ABOVE_BYTES
    )
    ir.save(model, path, external_data=f"{path.name}.data" if external else None)


def lower_graph(graph: ir.Model, target: str, plan: Plan, section: CompileSection) -> ir.Model:
    """Lower an exported graph for a target, in place, and name the plan in it.

    Args:
        graph: The exported graph.
        target: A target of the recipe, or "fp32".
        plan: The plan.
        section: The recipe's compile section.

    Raises:
        CompileError: The target does not have a layer's format, or local paths are left.
    """
    kind = target_named(target)
    model = kind.lower(graph)
    if kind.is_engine:
        write_batch_profile(model, section.opt_batch, section.max_batch)
    model.metadata_props[PLAN_KEY] = plan_digest(plan)
    check_metadata(model)
    return model


def write_graph(
    path: Path,
    model: ir.Model,
    target: str,
    plan: Plan,
    tensors: Mapping[str, NDArray[Any]],
    section: CompileSection,
) -> list[AuditLayer]:
    """Write a lowered graph and audit the file.

    Args:
        path: The model file; external data goes to `<path>.data`.
        model: What `lower_graph` returned.
        target: The target.
        plan: The plan.
        tensors: The plan's tensors.
        section: The recipe's compile section.

    Returns:
        What every layer became; nothing for a target without quantized layers.

    Raises:
        CompileError: A layer did not become integer arithmetic, or has sums that are not exact on
            this processor.
    """
    save_model(model, path, section.external_data)
    kind = target_named(target)
    if kind.audit is None:
        return []
    audit = kind.audit.read(path, plan, tensors)
    kind.audit.check(target, audit)
    exact = audit_sums(model, kind.different_ways, plan, tensors)
    audit = [entry.model_copy(update={"exact_sums": exact.get(entry.name)}) for entry in audit]
    check_sums(target, audit, plan, *read_cpu())
    return audit


def compile_target(
    run: Path,
    graph: ir.Model,
    target: str,
    plan: Plan,
    tensors: Mapping[str, NDArray[Any]],
    section: CompileSection,
) -> CompiledTarget:
    """Compile a target of a run; its folder appears only when the audit has passed."""
    model = lower_graph(graph, target, plan, section)
    final = run / RunFolder.graph(target)
    with atomic_folder(final.parent, OUR_FILES) as folder:
        audit = write_graph(folder / MODEL_FILE, model, target, plan, tensors, section)
    data = final.with_name(DATA_FILE)
    return CompiledTarget(
        target=target,
        path=str(final.relative_to(run)),
        size_bytes=sum(file.stat().st_size for file in model_files(final)),
        sha256=sha256_of_file(final),
        data_sha256=sha256_of_file(data) if data.is_file() else None,
        audit=audit,
    )


def run_compile(
    run: Path,
    denoiser: Denoiser,
    plan: Plan,
    tensors: Mapping[str, NDArray[Any]],
    section: CompileSection,
    on_step: OnStep,
) -> CompileRecord:
    """Write every target of the recipe and the fp32 graph, and `compile.json`.

    Args:
        run: The run folder.
        denoiser: The full-precision model.
        plan: The calibrated plan.
        tensors: The plan's tensors.
        section: The recipe's compile section.
        on_step: Called with the fraction done, 0..1.

    Returns:
        What was written, the fp32 graph last.

    Raises:
        CompileError: The model cannot be exported, or an audit failed; names the layers.
    """
    steps = len(section.targets) + 3
    exported = export_graph(quantize_model(denoiser, plan, tensors), section.max_batch)
    on_step(1 / steps)
    done: list[CompiledTarget] = []
    for index, target in enumerate(section.targets, start=2):
        last = target == section.targets[-1]
        graph = exported if last else exported.clone()
        done.append(compile_target(run, graph, target, plan, tensors, section))
        on_step(index / steps)
    del exported
    graph = export_graph(denoiser, section.max_batch)
    on_step((steps - 1) / steps)
    done.append(compile_target(run, graph, FP32, plan, tensors, section))
    processor, sets = read_cpu()
    record = CompileRecord(targets=done, processor=processor, instruction_sets=sets)
    save_record(run / RunFolder.COMPILE, record)
    on_step(1.0)
    return record
