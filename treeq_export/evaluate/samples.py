"""Samples of one seed, cached as safetensors so that an interrupted evaluation goes on.

A file is used again only if its fingerprint equals that of what is asked for: weights, sampler,
number, seed, conditioning. It is written as a whole or not at all.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor

from treeq_export import __version__
from treeq_export.artefacts import sha256_of_file
from treeq_export.errors import PlanError, TreeqError
from treeq_export.model.checkpoint import digest_tensors
from treeq_export.model.zoo import Denoiser
from treeq_export.progress import Say, say_nothing
from treeq_export.reading import load_safetensors
from treeq_export.run_folder import RunFolder
from treeq_export.runners.model_files import model_files
from treeq_export.sealed import read_sealed_metadata, write_sealed_tensors

_TENSOR = "samples"


def digest_denoiser(denoiser: Denoiser) -> str:
    """Return the digest of a model's configuration and of all its tensors as they are in memory."""
    config = dict(cast(Any, denoiser.model).config)
    public = {name: str(config[name]) for name in sorted(config) if not name.startswith("_")}
    tensors = dict(denoiser.named_parameters()) | dict(denoiser.named_buffers())
    return _digest_lines([denoiser.class_name, json.dumps(public), digest_tensors(tensors)])


def digest_quantized(run: Path, runner: str) -> str:
    """Return the digest of the files that the quantized images come from.

    Args:
        run: The run folder.
        runner: "torch" (the plan, its tensors and the finetuned ones) or a compiled target (graph
            and external data).

    Raises:
        PlanError: The files are missing; names the stage that writes them.
    """
    if runner == "torch":
        stage, files = "calibrate", [run / RunFolder.PLAN, run / RunFolder.TENSORS]
        if (run / RunFolder.FINETUNE).is_file():
            stage, files = "finetune", [*files, run / RunFolder.FINETUNED]
    else:
        path = run / RunFolder.graph(runner)
        stage, files = "compile", model_files(path) or [path]
    for file in files:
        if not file.is_file():
            raise PlanError(f"{file}: missing. Run `treeq-export {stage} --run {run}` first.")
    return _digest_lines(sha256_of_file(file) for file in files)


def make_fingerprint(**parts: Any) -> str:
    """Return a digest of JSON values that decide what is sampled, and of this package's version."""
    return _digest_lines([__version__, json.dumps(parts, sort_keys=True)])


def _digest_lines(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sample_or_load(
    path: Path, fingerprint: str, make: Callable[[], Tensor], say: Say = say_nothing
) -> NDArray[np.float32]:
    """Return cached samples, or make and cache them.

    Args:
        path: The safetensors file.
        fingerprint: Digest of what is asked for.
        make: Samples, (n, *sample_shape) float32.
        say: Told in one line that the file is damaged.

    Returns:
        The samples; they may hold NaN (`check_finite`).

    Raises:
        OutputError: The file cannot be written.
    """
    if read_sealed_metadata(path, fingerprint, say) is not None:
        return load_safetensors(path, error=TreeqError, remedy="")[_TENSOR]
    samples = np.ascontiguousarray(make().numpy())
    write_sealed_tensors(path, save_file, {_TENSOR: samples}, fingerprint)
    return samples


def check_finite(samples: NDArray[np.float32], who: str, remedy: str) -> None:
    """Check that every sample is finite.

    Args:
        samples: (n, ...).
        who: Name of what made them, for the message.
        remedy: Advice, for the message.

    Raises:
        TreeqError: Some are not.
    """
    bad = int((~np.isfinite(samples).reshape(len(samples), -1).all(axis=1)).sum())
    if bad:
        raise TreeqError(
            f"{who}: {bad} of {len(samples)} images hold NaN or infinity, expected none. {remedy}"
        )
