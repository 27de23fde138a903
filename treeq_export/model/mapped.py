"""Tensors whose memory is a file: larger than memory is, and gone when they are.

The system writes their pages out where memory is short. The file has no name any more once it is
mapped, so a killed process leaves nothing behind; its space is reserved first, since writing to a
mapping on a full disk would end the process without a word.
"""

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from treeq_export.errors import OutputError


def make_tensor(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> Tensor:
    """Return a tensor to be filled.

    Args:
        shape: Shape of the tensor.
        dtype: Data type of the tensor.
        folder: Folder of the file; None takes memory.

    Raises:
        OutputError: There is no space for it, or the folder cannot be written to.
    """
    made = torch.empty(shape, dtype=dtype, device="cpu" if folder is None else "meta")
    if folder is None or not made.nbytes:
        return torch.empty(shape, dtype=dtype)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=folder, prefix=f".treeq-{os.getpid()}-", suffix=".partial"
        ) as file:
            os.posix_fallocate(file.fileno(), 0, made.nbytes)
            mapped = torch.from_file(file.name, shared=True, size=made.numel(), dtype=dtype)
    except OSError as error:
        raise OutputError(
            f"{folder}: no file of {made.nbytes / 1e9:.1f} GB can be made in it "
            f"({error.strerror or error}). Free as much space, or choose another --out folder, "
            "then run the same command again."
        ) from error
    return mapped.view(shape)
