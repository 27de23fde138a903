"""Lint of a Triton model repository: the protobuf schema, and what the schema misses.

The lists below are the registry: a rule is a generator that looks at one configuration, or at the
repository, and yields (file, message). Its name, with dashes, is its id. All rules are run on every
configuration, whatever the others found.

What Triton itself refuses, accepts, or accepts and then fails at was tried with the server 2.51 and
read in the sources of core, onnxruntime_backend and tensorrt_backend (releases 24.10 to 26.06).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from treeq_export.errors import ServeError
from treeq_export.serve import (
    lint_batching,
    lint_ensemble,
    lint_files,
    lint_graph,
    lint_identity,
    lint_manifest,
    lint_tensors,
    lint_warmup,
    lint_wiring,
)
from treeq_export.serve.lint_read import Config, Remarks, Repository, read_repository

REPOSITORY_RULES: tuple[Callable[[Repository], Remarks], ...] = (
    lint_identity.folder_is_model,
    lint_identity.config_is_there,
    lint_identity.schema,
    lint_identity.manifest_is_readable,
    lint_identity.path_is_fit,
    lint_identity.launch_is_guarded,
    lint_manifest.file_is_as_written,
)
CONFIG_RULES: tuple[Callable[[Config], Remarks], ...] = (
    lint_identity.key_is_unique,
    lint_identity.name_is_folder,
    lint_identity.backend_is_named,
    lint_identity.platform_fits_backend,
    lint_identity.instance_count,
    lint_identity.instance_device,
    lint_identity.instance_profile,
    lint_identity.execution_environment,
    lint_identity.op_library,
    lint_files.version_is_there,
    lint_files.version_policy,
    lint_files.model_file,
    lint_files.python_model,
    lint_files.label_file,
    lint_tensors.tensors_are_stated,
    lint_tensors.tensor_name,
    lint_tensors.tensor_type,
    lint_tensors.tensor_dims,
    lint_tensors.tensor_reshape,
    lint_tensors.tensor_format,
    lint_tensors.tensor_is_optional,
    lint_batching.max_batch,
    lint_batching.batch_fits_profile,
    lint_batching.preferred_batch,
    lint_batching.batching_needs_batches,
    lint_batching.queue_delay,
    lint_batching.queue_priority,
    lint_batching.decoupled_answers,
    lint_warmup.warmup_runs,
    lint_warmup.warmup_inputs,
    lint_warmup.warmup_types,
    lint_warmup.warmup_dims,
    lint_warmup.warmup_data,
    lint_warmup.warmup_files,
    lint_warmup.warmup_covers_profile,
    lint_graph.graph_is_readable,
    lint_graph.graph_inputs,
    lint_graph.graph_outputs,
    lint_graph.external_data,
    lint_graph.operator_is_known,
    lint_ensemble.ensemble_form,
    lint_ensemble.ensemble_models,
    lint_ensemble.ensemble_maps,
    lint_ensemble.ensemble_tensors,
    lint_ensemble.ensemble_flow,
    lint_wiring.sampler_parameters,
    lint_wiring.sampler_inputs,
    lint_wiring.sampler_outputs,
    lint_wiring.sampler_has_denoiser,
    lint_wiring.sampler_fits_denoiser,
    lint_wiring.sampler_reads_prediction,
    lint_wiring.sampler_has_decoder,
    lint_wiring.variant_is_same_model,
    lint_wiring.variant_is_complete,
)


@dataclass(frozen=True)
class Finding:
    """Something in a repository that is not right.

    Attributes:
        path: The file or folder, relative to the repository.
        rule: Id of the rule.
        message: What is meant, what was received, what was expected, the remedy; one line.
    """

    path: Path
    rule: str
    message: str


def rule_id(rule: Callable[..., Remarks]) -> str:
    """Return the id of a rule, such as "name-is-folder"."""
    return rule.__name__.replace("_", "-")


def lint_repository(
    root: Path, final_root: Path | None = None, *, with_files: bool = True
) -> list[Finding]:
    """Look for what is not right in a model repository.

    Args:
        root: The folder that holds the models' folders.
        final_root: Where the repository will lie on the server: absolute paths below it in
            configurations are looked up below `root`. None if it lies there.
        with_files: Whether to compare the files with manifest.json, which reads all of them.

    Returns:
        Each finding once, by rule and model; none if all is right.

    Raises:
        ServeError: No such folder, no model in it, or tritonclient is not installed.
    """
    repository = read_repository(root, final_root)
    found: dict[Finding, None] = {}  # a set that keeps the order

    def add(rule: Callable[..., Remarks], remarks: Remarks) -> None:
        for path, message in remarks:
            finding = Finding(path.relative_to(repository.root), rule_id(rule), message)
            found.setdefault(finding)

    for rule in REPOSITORY_RULES:
        if with_files or rule is not lint_manifest.file_is_as_written:
            add(rule, rule(repository))
    for folder in repository.folders.values():
        for config in folder.configs:
            for config_rule in CONFIG_RULES:
                add(config_rule, config_rule(config))
    return list(found)


def check_repository(root: Path, final_root: Path | None = None) -> None:
    """Check that lint finds nothing in a repository whose manifest is about to be written.

    Args:
        root: See `lint_repository`.
        final_root: See `lint_repository`.

    Raises:
        ServeError: The first finding, and how many more there are.
    """
    findings = lint_repository(root, final_root, with_files=False)
    if not findings:
        return
    first, *others = findings
    more = f" ({len(others)} more: `treeq-export lint {root}` lists all.)" if others else ""
    raise ServeError(f"{root / first.path}: {first.rule}: {first.message}{more}")
