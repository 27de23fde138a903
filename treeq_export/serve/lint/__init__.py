"""Lint of a Triton model repository: the protobuf schema, and what `serve` promises.

Every configuration is parsed by Triton's own schema. The other rules judge what `serve` writes: the
models sampler, denoiser and vae_decoder, the files in them, and manifest.json and launch.sh beside
them. Other models of the repository are left to the server.

The lists below are the registry: a rule is a generator that looks at one configuration, or at the
repository, and yields (file, message). Its name, with dashes, is its id. All rules are run on every
configuration of ours, whatever the others found.

What Triton itself refuses, accepts, or accepts and then fails at was tried with the server 2.51 and
read in the sources of core, onnxruntime_backend and tensorrt_backend (releases 24.10 to 26.06).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from treeq_export.errors import ServeError
from treeq_export.serve.lint import files, graph, models, sampler, tensors
from treeq_export.serve.lint.read import Config, Remarks, Repository, read_repository

REPOSITORY_RULES: tuple[Callable[[Repository], Remarks], ...] = (
    files.config_is_there,
    files.schema,
    files.manifest_is_readable,
    files.path_is_fit,
    files.launch_is_guarded,
    files.file_is_as_written,
)
CONFIG_RULES: tuple[Callable[[Config], Remarks], ...] = (
    models.name_is_folder,
    models.instance_device,
    models.op_library,
    models.version_is_there,
    models.model_file,
    models.max_batch,
    models.batch_fits_profile,
    models.queue_delay,
    models.variant_is_same_model,
    tensors.tensors_are_stated,
    tensors.warmup_inputs,
    tensors.warmup_values,
    tensors.warmup_covers_profile,
    graph.graph_is_readable,
    graph.graph_tensors,
    sampler.sampler_parameters,
    sampler.sampler_inputs,
    sampler.sampler_outputs,
    sampler.sampler_fits_denoiser,
    sampler.sampler_has_decoder,
)


@dataclass(frozen=True)
class Finding:
    """Something in a repository that is not right.

    Attributes:
        path: The file or folder, relative to the repository.
        rule: Id of the rule.
        message: One line: the subject, what was received, what was expected, the remedy.
    """

    path: Path
    rule: str
    message: str


def rule_id(rule: Callable[..., Remarks]) -> str:
    """Return the id of a rule, for example "name-is-folder"."""
    return rule.__name__.replace("_", "-")


def lint_repository(
    root: Path, final_root: Path | None = None, *, with_files: bool = True
) -> list[Finding]:
    """Look for what is not right in a model repository.

    Args:
        root: The folder that holds the models' folders.
        final_root: The repository's place on the server: absolute paths below it in configurations
            are looked up below `root`. None if it lies there.
        with_files: Whether to compare the files with manifest.json, which reads all of them.

    Returns:
        Each finding once, by rule and model; none if all is right.

    Raises:
        ServeError: The folder does not exist or has no model, or tritonclient is not installed.
    """
    repository = read_repository(root, final_root)
    found: dict[Finding, None] = {}  # a set that keeps the order

    def add(rule: Callable[..., Remarks], remarks: Remarks) -> None:
        for path, message in remarks:
            finding = Finding(path.relative_to(repository.root), rule_id(rule), message)
            found.setdefault(finding)

    for rule in REPOSITORY_RULES:
        if with_files or rule is not files.file_is_as_written:
            add(rule, rule(repository))
    for folder in repository.own_models:
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
